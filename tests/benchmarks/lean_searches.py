"""`python -m benchmarks.lean_searches`: what a search costs with encodings and without, and what fetching them costs then."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pybase64
from haystack import Document as HaystackDocument
from haystack.utils import Secret
from haystack_integrations.components.retrievers.pgvector import PgvectorEmbeddingRetriever
from haystack_integrations.document_stores.pgvector import PgvectorDocumentStore
from langchain_chroma import Chroma
from langchain_classic.storage import LocalFileStore, create_kv_docstore
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_postgres import Column, PGEngine, PGVector, PGVectorStore
from langchain_qdrant import QdrantVectorStore
from llama_index.core.schema import TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores.types import VectorStoreQuery
from llama_index.vector_stores.qdrant import QdrantVectorStore as LlamaIndexQdrant
from qdrant_client import QdrantClient, models
from tools.servers import postgres

from benchmarks import machine, trials
from benchmarks.rows import progress
from benchmarks.tables import significant, table
from kalm_integrations import haystack, langchain, llama_index
from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY

WIDTH = 384
EMBEDDINGS = DeterministicFakeEmbedding(size=WIDTH)
TEXT = "A passage of the length that retrievers give. " * 24
CHARACTERS = (28_500, 109_000)
"""Of the string for 256 tokens of Nano at ratio 4: in rot4 and in fp16."""


@dataclass
class Ways:
    """A store's searches, each from a query vector and k to hits, and what fetches the encodings of hits."""

    whole: Callable[[list[float], int], Sequence[Any]]
    lean: Callable[[list[float], int], Sequence[Any]]
    fetch: Callable[[Sequence[Any]], Sequence[Any]]


Pages = Sequence[tuple[str, str, str]]
"""Id, text and encoding."""


def _documents(pages: Pages, *, with_encodings: bool = True) -> list[Document]:
    return [
        Document(t, id=i, metadata={ENCODING_KEY: e, FINGERPRINT_KEY: "0" * 32} if with_encodings else {}) for i, t, e in pages
    ]


def _langchain(whole: Any, lean: Any, fetch: Any) -> Ways:
    def searching(store: Any) -> Callable[[list[float], int], Sequence[Any]]:
        return lambda vector, k: store.similarity_search_by_vector(vector, k=k)

    return Ways(searching(whole), searching(lean), fetch)


def langchain_qdrant(pages: Pages, folder: Path, uri: str) -> Ways:
    client = QdrantClient(path=str(folder / "qdrant"))
    client.create_collection("pages", models.VectorParams(size=WIDTH, distance=models.Distance.COSINE))
    whole = QdrantVectorStore(client, "pages", EMBEDDINGS)
    whole.add_documents(_documents(pages), ids=[i for i, _, _ in pages])
    lean = QdrantVectorStore(langchain.LeanQdrantClient(client), "pages", EMBEDDINGS)
    return _langchain(whole, lean, langchain.fetch_from(whole))


def langchain_columns(pages: Pages, folder: Path, uri: str) -> Ways:
    engine = PGEngine.from_connection_string(uri.replace("postgresql://", "postgresql+psycopg://"))
    name = f"columns_{uuid4().hex}"
    columns = [Column(key, "text") for key in (ENCODING_KEY, FINGERPRINT_KEY)]
    engine.init_vectorstore_table(name, WIDTH, metadata_columns=columns, store_metadata=False)
    whole = PGVectorStore.create_sync(engine, EMBEDDINGS, name, metadata_columns=[ENCODING_KEY, FINGERPRINT_KEY])
    whole.add_documents(_documents(pages), ids=[i for i, _, _ in pages])
    lean = PGVectorStore.create_sync(engine, EMBEDDINGS, name, ignore_metadata_columns=[ENCODING_KEY])
    return _langchain(whole, lean, langchain.fetch_from(whole))


def _beside(whole: Any, lean: Any, pages: Pages, folder: Path) -> Ways:
    encodings = create_kv_docstore(LocalFileStore(folder / "encodings"))
    encodings.mset([(document.id, document) for document in _documents(pages)])
    whole.add_documents(_documents(pages), ids=[i for i, _, _ in pages])
    lean.add_documents(_documents(pages, with_encodings=False), ids=[f"lean-{i}" for i, _, _ in pages])
    fetch = langchain.fetch_from(encodings, id_of=lambda document: document.id.removeprefix("lean-"))
    return _langchain(whole, lean, fetch)


def langchain_pgvector(pages: Pages, folder: Path, uri: str) -> Ways:
    uri = uri.replace("postgresql://", "postgresql+psycopg://")
    whole, lean = (PGVector(EMBEDDINGS, connection=uri, collection_name=str(uuid4())) for _ in range(2))
    return _beside(whole, lean, pages, folder)


def langchain_chroma(pages: Pages, folder: Path, uri: str) -> Ways:
    whole, lean = (Chroma(name, EMBEDDINGS, persist_directory=str(folder / "chroma")) for name in ("whole", "lean"))
    return _beside(whole, lean, pages, folder)


def llama_index_qdrant(pages: Pages, folder: Path, uri: str) -> Ways:
    client = QdrantClient(path=str(folder / "qdrant"))
    nodes = [
        TextNode(id_=i, text=t, embedding=EMBEDDINGS.embed_query(i), metadata={ENCODING_KEY: e, FINGERPRINT_KEY: "0" * 32})
        for i, t, e in pages
    ]
    whole, lean, encodings = (
        LlamaIndexQdrant("whole", client=client),
        LlamaIndexQdrant("lean", client=client),
        SimpleDocumentStore(),
    )
    whole.add(nodes)
    lean.add([node.model_copy(update={"metadata": {}}) for node in nodes])
    encodings.add_documents(nodes)

    def searching(store: Any) -> Callable[[list[float], int], Sequence[Any]]:
        return lambda vector, k: store.query(VectorStoreQuery(query_embedding=vector, similarity_top_k=k)).nodes

    return Ways(searching(whole), searching(lean), llama_index.fetch_from(encodings))


def haystack_pgvector(pages: Pages, folder: Path, uri: str) -> Ways:
    def open_store(name: str) -> PgvectorDocumentStore:
        return PgvectorDocumentStore(
            connection_string=Secret.from_token(uri),
            table_name=name,
            keyword_index_name=f"{name}_k",
            embedding_dimension=WIDTH,
        )

    whole, lean = open_store(f"w{uuid4().hex}"), open_store(f"l{uuid4().hex}")
    bare = [HaystackDocument(id=i, content=t, embedding=EMBEDDINGS.embed_query(i)) for i, t, _ in pages]
    carrying = [
        HaystackDocument(
            id=i, content=t, embedding=EMBEDDINGS.embed_query(i), meta={ENCODING_KEY: e, FINGERPRINT_KEY: "0" * 32}
        )
        for i, t, e in pages
    ]
    whole.write_documents(carrying)
    lean.write_documents(bare)

    def searching(store: Any) -> Callable[[list[float], int], Sequence[Any]]:
        retriever = PgvectorEmbeddingRetriever(document_store=store)
        return lambda vector, k: retriever.run(query_embedding=vector, top_k=k)["documents"]

    return Ways(searching(whole), searching(lean), haystack.fetch_from(whole))


STORES: dict[str, Callable[[Pages, Path, str], Ways]] = {
    "LangChain, Qdrant (local mode), `LeanQdrantClient`": langchain_qdrant,
    "LangChain, PGVectorStore, `ignore_metadata_columns`": langchain_columns,
    "LangChain, PGVector (JSONB), encodings in a LocalFileStore": langchain_pgvector,
    "LangChain, Chroma, encodings in a LocalFileStore": langchain_chroma,
    "LlamaIndex, Qdrant (local mode), encodings in a SimpleDocumentStore": llama_index_qdrant,
    "Haystack, pgvector, encodings fetched from another table": haystack_pgvector,
}


def measure(ways: Ways, ks: Sequence[int], rounds: int) -> dict[int, dict[str, float]]:
    """Return for each k the median milliseconds of each way, one after the other in every round."""
    measured: dict[int, dict[str, list[float]]] = {k: {"whole": [], "lean": [], "fetch": []} for k in ks}
    for i in range(rounds + 2):
        vector = EMBEDDINGS.embed_query(f"query {i}")
        for k, seconds in measured.items():
            for name, search in (("whole", ways.whole), ("lean", ways.lean)):
                started = time.perf_counter()
                hits = search(vector, k)
                seconds[name].append(time.perf_counter() - started)
                assert len(hits) == k
            started = time.perf_counter()
            fetched = ways.fetch(hits)
            seconds["fetch"].append(time.perf_counter() - started)
            assert all(fetched)
    # The first two open connections and fill caches.
    return {k: {name: 1000 * statistics.median(s[2:]) for name, s in seconds.items()} for k, seconds in measured.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the results, and print the table of docs/stores.md."""
    parser = trials.parser("lean_searches", __doc__)
    parser.add_argument("--passages", type=int, default=300)
    parser.add_argument("--characters", type=int, nargs="+", default=CHARACTERS)
    parser.add_argument("--k", type=int, nargs="+", default=(20, 50))
    parser.add_argument("--rounds", type=int, default=61)
    options = trials.parse(parser, arguments)
    draw = random.Random(0)
    rows = []
    with postgres() as uri:
        for characters in options.characters:
            for name, fill in STORES.items():
                payloads = [pybase64.b64encode(draw.randbytes(characters * 3 // 4)).decode() for _ in range(options.passages)]
                # Of their own: in PGVector ids are unique in the database.
                pages = [(str(uuid4()), f"{i} {TEXT}", payload) for i, payload in enumerate(payloads)]
                with tempfile.TemporaryDirectory() as folder:
                    ways = fill(pages, Path(folder), uri)
                    for k, medians in measure(ways, options.k, options.rounds).items():
                        rows.append({"store": name, "characters": characters, "k": k, **medians})
                        progress(str(rows[-1]))
    about = {"machine": machine.describe("cpu"), "passages": options.passages, "rounds": options.rounds}
    trials.write(options.output, {**about, "rows": rows})
    print(render(rows))


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of docs/stores.md."""
    head = ["store", "characters", "k", "search that carries the string, ms", "search without, ms", "fetching all k, ms"]
    cells = [
        [r["store"], f"{r['characters']:,}", r["k"], *(significant(r[way]) for way in ("whole", "lean", "fetch"))]
        for r in rows
    ]
    return table(head, cells)


if __name__ == "__main__":
    main()
