"""Searches of real stores that leave encodings out: they are fetched by id, once, and nothing is encoded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import chromadb
import pytest
from benchmarks import lean_searches
from haystack import Document as HaystackDocument
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.utils import Secret
from haystack_integrations.components.retrievers.chroma import ChromaEmbeddingRetriever
from haystack_integrations.components.retrievers.pgvector import PgvectorEmbeddingRetriever
from haystack_integrations.components.retrievers.qdrant import QdrantEmbeddingRetriever
from haystack_integrations.document_stores.chroma import ChromaDocumentStore
from haystack_integrations.document_stores.pgvector import PgvectorDocumentStore
from haystack_integrations.document_stores.qdrant import QdrantDocumentStore
from langchain_chroma import Chroma
from langchain_classic.storage import LocalFileStore, create_kv_docstore
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_postgres import Column, PGEngine, PGVector, PGVectorStore
from langchain_qdrant import QdrantVectorStore
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores.types import VectorStoreQuery
from llama_index.vector_stores.chroma import ChromaVectorStore
from llama_index.vector_stores.qdrant import QdrantVectorStore as LlamaIndexQdrant
from qdrant_client import QdrantClient, models

from kalm_integrations import haystack, langchain, llama_index
from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY

QUERY = "who won the game"
TEXTS = ["the panthers won", "rain is wet", "who lost the game"]
IDS = [str(uuid4()) for _ in TEXTS]
WIDTH = 3
EMBEDDINGS = DeterministicFakeEmbedding(size=WIDTH)
VECTOR = [1.0, 0.5, 0.25]


def langchain_documents() -> list[Document]:
    return [Document(text, id=i, metadata={"page": i}) for i, text in zip(IDS, TEXTS, strict=True)]


def check_langchain(store: Any, fetch: Any, make_reranker: Any) -> None:
    hits = store.similarity_search(QUERY, k=len(TEXTS))
    assert sorted(hit.metadata["page"] for hit in hits) == sorted(IDS)
    assert not any(ENCODING_KEY in hit.metadata for hit in hits)
    n_asked = []
    reranker = make_reranker()
    rerank = langchain.KalmRerank(model=reranker, fetch=lambda given: (n_asked.append(len(given)), fetch(given))[1])
    for _ in range(2):
        assert len(rerank.compress_documents(store.similarity_search(QUERY, k=len(TEXTS)), QUERY)) == len(TEXTS)
    assert reranker.stats.passages_encoded == 0
    assert n_asked == [len(TEXTS)]


def encode_for_langchain(make_reranker: Any) -> list[Document]:
    return list(langchain.KalmPassageEncoder(model=make_reranker()).transform_documents(langchain_documents()))


def open_qdrant(folder: Path, **settings: Any) -> tuple[QdrantVectorStore, QdrantClient]:
    client = QdrantClient(path=str(folder))
    client.create_collection("pages", models.VectorParams(size=WIDTH, distance=models.Distance.COSINE))
    return QdrantVectorStore(langchain.LeanQdrantClient(client), "pages", EMBEDDINGS, **settings), client


def test_langchain_qdrant_leaves_encodings_out_of_searches_only(tmp_path, make_reranker):
    store, client = open_qdrant(tmp_path)
    store.add_documents(encode_for_langchain(make_reranker), ids=IDS)
    check_langchain(store, langchain.fetch_from(store), make_reranker)
    assert all(ENCODING_KEY in document.metadata for document in store.get_by_ids(IDS))
    point = client.query_points("pages", VECTOR, limit=1).points[0]
    assert ENCODING_KEY in point.payload["metadata"]
    client.close()


def test_a_lean_client_lets_write_back_and_backfill_through(tmp_path, make_reranker):
    store, client = open_qdrant(tmp_path)
    store.add_documents(langchain_documents(), ids=IDS)
    reranker, fetch = make_reranker(), langchain.fetch_from(store)
    rerank = langchain.KalmRerank(model=reranker, fetch=fetch, write_back=langchain.write_back_to(store))
    rerank.compress_documents(store.similarity_search(QUERY, k=1), QUERY)
    assert langchain.wait_for_write_back(20)
    encoder = langchain.KalmPassageEncoder(model=reranker)
    assert langchain.backfill(store, encoder, show_progress=False).n_missing == len(TEXTS) - 1
    check_langchain(store, fetch, make_reranker)
    client.close()


def test_a_lean_client_knows_the_stores_keys(tmp_path, make_reranker):
    client = QdrantClient(":memory:")
    client.create_collection("pages", models.VectorParams(size=WIDTH, distance=models.Distance.COSINE))
    lean = langchain.LeanQdrantClient(client, metadata_payload_key="meta", encoding_key="kalm")
    store = QdrantVectorStore(lean, "pages", EMBEDDINGS, metadata_payload_key="meta")
    encoder = langchain.KalmPassageEncoder(model=make_reranker(), encoding_key="kalm")
    store.add_documents(list(encoder.transform_documents(langchain_documents())), ids=IDS)
    assert not any("kalm" in hit.metadata for hit in store.similarity_search(QUERY))
    assert lean.query_points("pages", VECTOR, with_payload=["meta.kalm"]).points[0].payload["meta"]["kalm"]


def test_langchain_pgvectorstore_ignores_a_column(postgres_uri, make_reranker):
    engine = PGEngine.from_connection_string(postgres_uri.replace("postgresql://", "postgresql+psycopg://"))
    table = f"lean_{uuid4().hex}"
    columns = [Column(name, "text") for name in ("page", ENCODING_KEY, FINGERPRINT_KEY)]
    engine.init_vectorstore_table(table, WIDTH, metadata_columns=columns, store_metadata=False)
    names = [column.name for column in columns]
    whole = PGVectorStore.create_sync(engine, EMBEDDINGS, table, metadata_columns=names)
    whole.add_documents(encode_for_langchain(make_reranker), ids=IDS)
    lean = PGVectorStore.create_sync(engine, EMBEDDINGS, table, ignore_metadata_columns=[ENCODING_KEY])
    check_langchain(lean, langchain.fetch_from(whole), make_reranker)


def langchain_chroma(tmp_path, postgres_uri):
    return Chroma("pages", EMBEDDINGS, persist_directory=str(tmp_path / "chroma"))


def langchain_pgvector(tmp_path, postgres_uri):
    uri = postgres_uri.replace("postgresql://", "postgresql+psycopg://")
    return PGVector(EMBEDDINGS, connection=uri, collection_name=f"lean-{uuid4()}")


@pytest.mark.parametrize("open_store", [langchain_chroma, langchain_pgvector])
def test_langchain_encodings_in_a_docstore_beside_the_store(open_store, tmp_path, postgres_uri, make_reranker):
    store = open_store(tmp_path, postgres_uri)
    encodings = create_kv_docstore(LocalFileStore(tmp_path / "encodings"))
    encoded = encode_for_langchain(make_reranker)
    encodings.mset([(document.id, document) for document in encoded])
    store.add_documents(langchain_documents(), ids=IDS)
    check_langchain(store, langchain.fetch_from(encodings), make_reranker)


def llama_index_chroma():
    return ChromaVectorStore(chroma_collection=chromadb.EphemeralClient().create_collection(f"lean-{uuid4()}"))


def llama_index_qdrant():
    return LlamaIndexQdrant("pages", client=QdrantClient(":memory:"))


@pytest.mark.parametrize("open_store", [llama_index_chroma, llama_index_qdrant])
def test_llama_index_encodings_in_a_docstore_beside_the_vectors(open_store, make_reranker):
    store, encodings = open_store(), SimpleDocumentStore()
    nodes = [TextNode(id_=i, text=text, embedding=VECTOR) for i, text in zip(IDS, TEXTS, strict=True)]
    store.add(nodes)
    encodings.add_documents(llama_index.KalmPassageEncoder(make_reranker())(nodes))

    def search() -> list[NodeWithScore]:
        found = store.query(VectorStoreQuery(query_embedding=VECTOR, similarity_top_k=len(TEXTS)))
        return [NodeWithScore(node=node, score=0.5) for node in found.nodes]

    assert not any(ENCODING_KEY in hit.metadata for hit in search())
    reranker = make_reranker()
    rerank = llama_index.KalmRerank(reranker, fetch=llama_index.fetch_from(encodings))
    for _ in range(2):
        assert len(rerank.postprocess_nodes(search(), query_str=QUERY)) == len(TEXTS)
    assert reranker.stats.passages_encoded == 0


@pytest.mark.parametrize("open_store", [llama_index_chroma, llama_index_qdrant])
def test_llama_index_encodings_out_of_a_vector_store(open_store, make_reranker):
    """That has them, for a retriever that lost them on the way."""
    store = open_store()
    nodes = [TextNode(id_=i, text=text, embedding=VECTOR) for i, text in zip(IDS, TEXTS, strict=True)]
    store.add(llama_index.KalmPassageEncoder(make_reranker())(nodes))
    reranker = make_reranker()
    rerank = llama_index.KalmRerank(reranker, fetch=llama_index.fetch_from(store))
    rerank.postprocess_nodes([NodeWithScore(node=node, score=0.5) for node in nodes], query_str=QUERY)
    assert reranker.stats.passages_encoded == 0


def haystack_chroma(tmp_path, postgres_uri):
    return ChromaDocumentStore(persist_path=str(tmp_path / "chroma")), ChromaEmbeddingRetriever


def haystack_qdrant(tmp_path, postgres_uri):
    return QdrantDocumentStore(":memory:", embedding_dim=WIDTH, progress_bar=False), QdrantEmbeddingRetriever


def haystack_pgvector(tmp_path, postgres_uri):
    uri = Secret.from_token(postgres_uri)
    table = f"lean_{uuid4().hex}"
    store = PgvectorDocumentStore(
        connection_string=uri, table_name=table, keyword_index_name=f"{table}_k", embedding_dimension=WIDTH
    )
    return store, PgvectorEmbeddingRetriever


HAYSTACK = [haystack_chroma, haystack_qdrant, haystack_pgvector]


@pytest.mark.parametrize("open_store", HAYSTACK)
def test_haystack_encodings_in_a_store_beside_the_store(open_store, tmp_path, postgres_uri, make_reranker):
    """Which needs no vectors; Chroma's would make some."""
    store, kind = open_store(tmp_path, postgres_uri)
    encodings = InMemoryDocumentStore() if open_store is haystack_chroma else open_store(tmp_path, postgres_uri)[0]
    pages = [HaystackDocument(id=i, content=text, embedding=VECTOR) for i, text in zip(IDS, TEXTS, strict=True)]
    store.write_documents(pages)
    bare = [replace(page, embedding=None) for page in pages]
    encodings.write_documents(haystack.KalmDocumentEncoder(model=make_reranker(), progress_bar=False).run(bare)["documents"])
    retriever, reranker = kind(document_store=store), make_reranker()
    ranker = haystack.KalmRanker(model=reranker, document_store=encodings, fetch_encodings=True)
    for _ in range(2):
        hits = retriever.run(query_embedding=VECTOR)["documents"]
        assert not any(ENCODING_KEY in hit.meta for hit in hits)
        assert len(ranker.run(QUERY, hits)["documents"]) == len(TEXTS)
    assert reranker.stats.passages_encoded == 0


@pytest.mark.parametrize("open_store", HAYSTACK)
def test_haystack_encodings_out_of_a_store(open_store, tmp_path, postgres_uri, make_reranker):
    """That has them, by one call for all."""
    store, _ = open_store(tmp_path, postgres_uri)
    pages = [HaystackDocument(id=i, content=text, embedding=VECTOR) for i, text in zip(IDS, TEXTS, strict=True)]
    store.write_documents(haystack.KalmDocumentEncoder(model=make_reranker(), progress_bar=False).run(pages)["documents"])
    reranker = make_reranker()
    ranker = haystack.KalmRanker(model=reranker, document_store=store, fetch_encodings=True)
    assert len(ranker.run(QUERY, [replace(page, embedding=None) for page in pages])["documents"]) == len(TEXTS)
    assert reranker.stats.passages_encoded == 0


def test_the_measurement_of_the_page_runs(tmp_path):
    output = tmp_path / "lean.json"
    lean_searches.main(["--passages", "8", "--characters", "400", "--k", "3", "--rounds", "1", "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert [row["store"] for row in rows] == list(lean_searches.STORES)
    assert all(row[way] > 0 for row in rows for way in ("whole", "lean", "fetch"))
