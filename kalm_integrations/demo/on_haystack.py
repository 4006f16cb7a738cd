"""The sample in Haystack: a document store that is saved to a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from haystack import Document, Pipeline
from haystack.components.retrievers.in_memory import InMemoryBM25Retriever
from haystack.components.writers import DocumentWriter
from haystack.document_stores.in_memory import InMemoryDocumentStore

from kalm_integrations.core.reranker import KalmReranker
from kalm_integrations.haystack import KalmDocumentEncoder, KalmRanker

FILE = "haystack.json"


def ingest(folder: Path, passages: Sequence[str], reranker: KalmReranker) -> None:
    """Encode passages, and save them with their encodings."""
    store = InMemoryDocumentStore()
    pipeline = Pipeline()
    pipeline.add_component("encoder", KalmDocumentEncoder(model=reranker, progress_bar=False))
    pipeline.add_component("writer", DocumentWriter(store))
    pipeline.connect("encoder", "writer")
    pipeline.run({"encoder": {"documents": [Document(content=passage) for passage in passages]}})
    store.save_to_disk(str(folder / FILE))


def ask(folder: Path, question: str, n_candidates: int, reranker: KalmReranker) -> list[str]:
    """Load the store, retrieve, and rerank."""
    store = InMemoryDocumentStore.load_from_disk(str(folder / FILE))
    pipeline = Pipeline()
    pipeline.add_component("retriever", InMemoryBM25Retriever(store, top_k=n_candidates))
    pipeline.add_component("ranker", KalmRanker(model=reranker, top_k=3))
    pipeline.connect("retriever", "ranker")
    output = pipeline.run({"retriever": {"query": question}, "ranker": {"query": question}})
    return [document.content or "" for document in output["ranker"]["documents"]]
