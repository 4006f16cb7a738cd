"""References in a vector store, payloads in a LangChain byte store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from langchain_classic.storage import LocalFileStore
from langchain_core.stores import InMemoryByteStore
from langchain_core.vectorstores import InMemoryVectorStore
from tools.langchain_helpers import TEXTS, CountingEmbeddings, make_documents

from kalm_integrations import KalmReranker
from kalm_integrations.errors import SettingsError
from kalm_integrations.langchain import ByteStorePayloads, KalmPassageEncoder, KalmRerank

QUERY = "what did the Panthers do"


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_reference_mode_keeps_payloads_in_a_byte_store(kind: str, tmp_path: Path, make_reranker: Callable[..., KalmReranker]):
    """The vector store gets short strings; a later reranker reads payloads through a new adapter on the same byte store."""
    byte_store = LocalFileStore(tmp_path) if kind == "file" else InMemoryByteStore()
    settings = {"storage_mode": "reference", "storage_codec": "fp32"}
    store = InMemoryVectorStore(CountingEmbeddings())
    encoder = KalmPassageEncoder(model=make_reranker(payload_store=ByteStorePayloads(byte_store), **settings))
    store.add_documents(encoder.transform_documents(make_documents()))
    assert len(ByteStorePayloads(byte_store)) == len(TEXTS)

    reranker = make_reranker(payload_store=ByteStorePayloads(byte_store), **settings)
    retrieved = store.similarity_search(QUERY, k=5)
    result = KalmRerank(model=reranker, top_n=None).compress_documents(retrieved, QUERY)
    assert max(len(document.metadata["kalm_encoding"]) for document in retrieved) < 500
    assert (reranker.stats.passages_encoded, reranker.stats.metadata_hits) == (0, len(TEXTS))
    expected = make_reranker().score(QUERY, [document.page_content for document in result])
    assert [document.metadata["relevance_score"] for document in result] == pytest.approx(expected, abs=1e-6)


def test_byte_store_payloads_are_a_mutable_mapping(tmp_path: Path):
    payloads = ByteStorePayloads(LocalFileStore(tmp_path))
    payloads["ab:cd:4:fp16"] = b"one"
    payloads.update({"ab:cd:8:fp16": b"two"})
    assert dict(payloads) == {"ab:cd:4:fp16": b"one", "ab:cd:8:fp16": b"two"}
    assert payloads.get("no:such:key") is None
    del payloads["ab:cd:4:fp16"]
    assert list(payloads) == ["ab:cd:8:fp16"]
    with pytest.raises(KeyError):
        del payloads["ab:cd:4:fp16"]
    with pytest.raises(SettingsError, match="must not contain '-'"):
        payloads["a-b"] = b""
