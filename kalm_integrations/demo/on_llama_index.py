"""The sample in LlamaIndex: an index whose stores are persisted to a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llama_index.core import StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import TextNode

from kalm_integrations.core.reranker import KalmReranker
from kalm_integrations.demo.words import embed
from kalm_integrations.llama_index import KalmPassageEncoder, KalmRerank

FOLDER = "llama_index"


class Words(BaseEmbedding):
    """Stands in for an embedding model."""

    def _get_text_embedding(self, text: str) -> list[float]:
        return embed(text)

    def _get_query_embedding(self, query: str) -> list[float]:
        return embed(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return embed(query)


def ingest(folder: Path, passages: Sequence[str], reranker: KalmReranker) -> None:
    """Encode passages, and persist them with their encodings."""
    pipeline = IngestionPipeline(transformations=[Words(), KalmPassageEncoder(model=reranker)])
    nodes = pipeline.run(nodes=[TextNode(text=passage) for passage in passages])
    index = VectorStoreIndex(nodes, embed_model=Words())
    index.storage_context.persist(str(folder / FOLDER))


def ask(folder: Path, question: str, n_candidates: int, reranker: KalmReranker) -> list[str]:
    """Load the index, retrieve, and rerank."""
    storage = StorageContext.from_defaults(persist_dir=str(folder / FOLDER))
    index = load_index_from_storage(storage, embed_model=Words())
    nodes = index.as_retriever(similarity_top_k=n_candidates).retrieve(question)
    best = KalmRerank(model=reranker, top_n=3).postprocess_nodes(nodes, query_str=question)
    return [node.get_content() for node in best]
