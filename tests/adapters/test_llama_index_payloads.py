"""Reference mode in LlamaIndex: payloads in key-value stores, and bounds on what is inline."""

from __future__ import annotations

import uuid

import pytest
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index.storage.kvstore.redis import RedisKVStore
from tools.llama_index_helpers import (
    QUERY,
    TEXTS,
    make_nodes,
    make_postgres_kvstore,
)

from kalm_integrations.core.types import ENCODING_KEY
from kalm_integrations.errors import EncodingTooLargeError, StoreError
from kalm_integrations.llama_index import (
    KalmPassageEncoder,
    KalmRerank,
    KVPayloadStore,
)


@pytest.mark.parametrize("kind", ["simple", "redis", "postgres"])
def test_payloads_live_in_a_key_value_store(request, kind, make_reranker):
    name = f"kalm_{uuid.uuid4().hex}"
    if kind == "simple":
        kvstore = SimpleKVStore()
    elif kind == "redis":
        kvstore = RedisKVStore(redis_uri=request.getfixturevalue("redis_url"))
    else:
        kvstore = make_postgres_kvstore(request.getfixturevalue("postgres_uri"), name)
    payloads = KVPayloadStore(kvstore, collection=name)
    reference = {"storage_mode": "reference", "payload_store": payloads}
    nodes = make_nodes()
    encoded = KalmPassageEncoder(make_reranker(**reference))(nodes)
    assert max(len(node.metadata[ENCODING_KEY]) for node in encoded) < 512
    assert len(payloads) == len(list(payloads)) == len(nodes)

    reranker = make_reranker(payload_store=KVPayloadStore(kvstore, collection=name))
    retrieved = [NodeWithScore(node=node) for node in encoded]
    assert KalmRerank(reranker, on_missing="error").postprocess_nodes(retrieved, query_str=QUERY)
    assert reranker.stats.passages_encoded == 0

    key = next(iter(payloads))
    del payloads[key]
    assert key not in payloads
    with pytest.raises(KeyError):
        del payloads[key]
    kvstore.put(key, {"payload": "nö base64"}, collection=name)
    assert payloads.get(key) is None
    lost = make_reranker(payload_store=payloads)
    KalmRerank(lost).postprocess_nodes(retrieved, query_str=QUERY)
    assert lost.stats.corrupt == lost.stats.passages_encoded == 1


def test_a_server_that_dies_fails_no_query(mortal_redis, make_reranker):
    """Its payloads are computed, at the price of one failed call; what is to be written there is refused."""
    url, server = mortal_redis
    settings = {"storage_mode": "reference", "cache_bytes": 0, "prefix_cache_bytes": 0}
    reranker = make_reranker(payload_store=KVPayloadStore(RedisKVStore(redis_uri=url)), **settings)
    retrieved = [NodeWithScore(node=node) for node in KalmPassageEncoder(reranker)(make_nodes())]
    before = KalmRerank(reranker, on_missing="error").postprocess_nodes(retrieved, query_str=QUERY)
    assert reranker.stats.store_failures == 0
    server.kill()
    server.wait(10)
    n_encoded = reranker.stats.passages_encoded
    for _ in range(2):
        after = KalmRerank(reranker).postprocess_nodes(retrieved, query_str=QUERY)
        assert [node.node.node_id for node in after] == [node.node.node_id for node in before]
        assert [node.score for node in after] == pytest.approx([node.score for node in before], abs=1e-3)
    assert reranker.stats.store_failures == 1
    assert reranker.stats.passages_encoded == n_encoded + 2 * len(retrieved)
    with pytest.raises(StoreError, match=r"payload_store cannot be used: KVPayloadStore raised ConnectionError"):
        KalmPassageEncoder(reranker)(make_nodes())


def test_max_inline_bytes_is_kept_or_refused_before_anything_is_stored(tiny_checkpoint):
    docstore = SimpleDocumentStore()
    nodes = [TextNode(text=" ".join(TEXTS * 3))]
    whole = KalmPassageEncoder(tiny_checkpoint)(nodes)[0].metadata[ENCODING_KEY]
    [node] = KalmPassageEncoder(tiny_checkpoint, max_inline_bytes=len(whole) // 2)(nodes)
    assert len(node.metadata[ENCODING_KEY]) <= len(whole) // 2
    with pytest.raises(EncodingTooLargeError, match="max_inline_bytes=100"):
        docstore.add_documents(KalmPassageEncoder(tiny_checkpoint, max_inline_bytes=100)(nodes))
    assert not docstore.docs


def test_a_payload_store_may_come_with_the_other_settings(tiny_checkpoint):
    payloads = KVPayloadStore(SimpleKVStore())
    settings = {"storage_mode": "reference", "payload_store": payloads}
    encoder = KalmPassageEncoder(tiny_checkpoint, model_kwargs=settings)
    IngestionPipeline(transformations=[encoder]).run(nodes=make_nodes())
    assert len(payloads) == len(TEXTS)
    assert encoder.to_dict()["model_kwargs"] == {"storage_mode": "reference"}
