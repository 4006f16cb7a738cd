"""One contract for a store that several hosts write to: what one adapter knows of it, all do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from haystack import Document as HaystackDocument
from haystack_integrations.document_stores.qdrant import QdrantDocumentStore
from langchain_core.documents import Document as LangChainDocument
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_qdrant import QdrantVectorStore as LangChainQdrant
from llama_index.core.schema import TextNode
from llama_index.vector_stores.qdrant import QdrantVectorStore as LlamaIndexQdrant
from qdrant_client import QdrantClient, models

from kalm_integrations import haystack, langchain, llama_index
from kalm_integrations.core.types import ENCODING_KEY
from kalm_integrations.hosting import qdrant
from kalm_integrations.testing import FakeReranker

TEXTS = ["one passage", "another passage", "a third one"]
WIDTH = 3

Filled = tuple[QdrantClient, str, Callable[[], Any]]
"""A client, a collection, and the backfill of what is in it."""


def fill_langchain() -> Filled:
    client = QdrantClient(":memory:")
    client.create_collection("kalm", models.VectorParams(size=WIDTH, distance=models.Distance.COSINE))
    store = LangChainQdrant(client, "kalm", DeterministicFakeEmbedding(size=WIDTH))
    store.add_documents([LangChainDocument(text) for text in TEXTS])
    encoder = langchain.KalmPassageEncoder(model=FakeReranker())
    return client, "kalm", lambda: langchain.backfill(store, encoder, show_progress=False)


def fill_llama_index() -> Filled:
    client = QdrantClient(":memory:")
    store = LlamaIndexQdrant("kalm", client=client)
    store.add([TextNode(text=text, embedding=[1.0, 0.0, 0.0]) for text in TEXTS])
    encoder = llama_index.KalmPassageEncoder(FakeReranker())
    return client, "kalm", lambda: llama_index.backfill(store, encoder, show_progress=False)


def fill_haystack() -> Filled:
    store = QdrantDocumentStore(":memory:", embedding_dim=WIDTH, progress_bar=False)
    store.write_documents([HaystackDocument(content=text, embedding=[1.0, 0.0, 0.0]) for text in TEXTS])
    encoder = haystack.KalmDocumentEncoder(model=FakeReranker())
    return store._client, store.index, lambda: haystack.backfill(store, encoder, progress_bar=False)


@pytest.mark.parametrize("fill", [fill_langchain, fill_llama_index, fill_haystack])
def test_qdrant_in_strict_mode_is_given_no_condition_that_needs_an_index(fill: Callable[[], Filled], monkeypatch: Any) -> None:
    """Collections of Qdrant Cloud are strict unless told otherwise, and would refuse the write."""
    client, name, backfill = fill()
    collection = client.get_collection(name)
    collection.config.strict_mode_config = models.StrictModeConfig(enabled=True, unindexed_filtering_update=False)
    operations, write = [], client.batch_update_points
    monkeypatch.setattr(client, "get_collection", lambda name: collection)
    monkeypatch.setattr(client, "batch_update_points", lambda name, batch: (operations.extend(batch), write(name, batch)))
    assert backfill().n_missing == len(TEXTS)
    assert [operation.set_payload.filter for operation in operations] == [None] * len(TEXTS)
    assert all(len(operation.set_payload.points) == 1 for operation in operations)
    points, _ = client.scroll(name, with_payload=True)
    assert [ENCODING_KEY in str(point.payload) for point in points] == [True] * len(TEXTS)
    assert backfill().n_missing == 0, "the host does not find what was written"


@pytest.mark.parametrize("key", ["metadata", None])
def test_qdrant_takes_fields_away_and_leaves_the_rest(key: str | None) -> None:
    """Also a field with a dot in its name, on the condition that another one holds, and beside points that are gone."""
    client = QdrantClient(":memory:")
    client.create_collection("kalm", models.VectorParams(size=WIDTH, distance=models.Distance.COSINE))
    inner = {"page": "1", "kalm": "old", "kalm_fp": "old", "a.b": "old"}
    payload = {**inner, "text": "one"} if key is None else {key: inner, "text": "one"}
    client.upsert("kalm", [models.PointStruct(id=i, vector=[1.0, 0.0, 0.0], payload=payload) for i in (1, 2)])
    change = {"kalm": None, "kalm_fp": "new", "a.b": None}
    changes = [qdrant.PayloadChange(1, change, ("text", "one")), qdrant.PayloadChange(2, change, ("text", "another"))]
    qdrant.add_payloads(client, "kalm", [*changes, qdrant.PayloadChange(3, change)], key)
    first, second = (point.payload for point in client.retrieve("kalm", [1, 2]))
    expected = {"page": "1", "kalm_fp": "new"}
    assert first == ({**expected, "text": "one"} if key is None else {key: expected, "text": "one"})
    assert second == payload
