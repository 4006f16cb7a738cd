"""The sample in LangChain: a vector store that is dumped to a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore

from kalm_integrations.core.reranker import KalmReranker
from kalm_integrations.demo.words import embed
from kalm_integrations.langchain import KalmPassageEncoder, KalmRerank

FILE = "langchain.json"


class Words(Embeddings):
    """Stands in for an embedding model."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents."""
        return [embed(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        """Embed a query."""
        return embed(text)


def ingest(folder: Path, passages: Sequence[str], reranker: KalmReranker) -> None:
    """Encode passages, and dump them with their encodings."""
    documents = [Document(page_content=passage) for passage in passages]
    store = InMemoryVectorStore(Words())
    store.add_documents(KalmPassageEncoder(model=reranker).transform_documents(documents))
    store.dump(str(folder / FILE))


def ask(folder: Path, question: str, n_candidates: int, reranker: KalmReranker) -> list[str]:
    """Load the store, retrieve, and rerank."""
    store = InMemoryVectorStore.load(str(folder / FILE), Words())
    retriever = store.as_retriever(search_kwargs={"k": n_candidates})
    chain = {"query": RunnablePassthrough(), "documents": retriever} | KalmRerank(model=reranker, top_n=3).as_runnable()
    return [document.page_content for document in chain.invoke(question)]
