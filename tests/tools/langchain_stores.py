"""LangChain's stores behind one face: each can be filled, changed, searched, and closed and opened again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import lancedb
import pyarrow as pa
from langchain_chroma import Chroma
from langchain_classic.storage import LocalFileStore, create_kv_docstore
from langchain_community.vectorstores import FAISS, LanceDB
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_milvus import Milvus
from langchain_postgres import Column, PGEngine, PGVector, PGVectorStore
from langchain_qdrant import QdrantVectorStore
from milvus_lite.server_manager import server_manager_instance
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, VectorParams

from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY
from tools.langchain_helpers import CountingEmbeddings

QUERY = "what did the Panthers do"
WIDTH = 16


class VectorHost:
    """A vector store that can be closed and opened again."""

    def __init__(self, embeddings: CountingEmbeddings) -> None:
        self.embeddings = embeddings
        self.store: Any = None
        self.open()

    def open(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass

    def drop(self) -> None:
        self.close()

    def restart(self) -> None:
        self.close()
        self.open()

    def add(self, documents: list[Document]) -> None:
        self.store.add_documents(documents, ids=[document.id for document in documents])

    def delete(self, ids: list[str | None]) -> None:
        self.store.delete(ids=ids)

    def retrieve(self, k: int = 20) -> list[Document]:
        return self.store.similarity_search(QUERY, k=k)


class ChromaHost(VectorHost):
    def __init__(self, embeddings: CountingEmbeddings, folder: Path) -> None:
        self.folder = folder
        super().__init__(embeddings)

    def open(self) -> None:
        self.store = Chroma("kalm", self.embeddings, persist_directory=str(self.folder))


class QdrantHost(VectorHost):
    def __init__(self, embeddings: CountingEmbeddings, folder: Path) -> None:
        self.folder = folder
        super().__init__(embeddings)

    def open(self) -> None:
        self.client = QdrantClient(path=str(self.folder))
        if not self.client.collection_exists("kalm"):
            self.client.create_collection("kalm", vectors_config=VectorParams(size=WIDTH, distance=Distance.COSINE))
        self.store = QdrantVectorStore(self.client, "kalm", self.embeddings, validate_collection_config=False)

    def close(self) -> None:
        self.client.close()


class PostgresHost(VectorHost):
    def __init__(self, embeddings: CountingEmbeddings, uri: str) -> None:
        self.uri = uri.replace("postgresql://", "postgresql+psycopg://")
        self.collection = f"langchain-{uuid4()}"
        super().__init__(embeddings)

    def open(self) -> None:
        self.store = PGVector(self.embeddings, connection=self.uri, collection_name=self.collection)

    def close(self) -> None:
        self.store._engine.dispose()

    def drop(self) -> None:
        # Ids are unique across the collections of a database.
        self.store.delete_collection()
        self.close()


class FaissHost(VectorHost):
    def __init__(self, embeddings: CountingEmbeddings, folder: Path) -> None:
        self.folder = str(folder)
        super().__init__(embeddings)

    def open(self) -> None:
        if Path(self.folder).exists():
            self.store = FAISS.load_local(self.folder, self.embeddings, allow_dangerous_deserialization=True)

    def close(self) -> None:
        self.store.save_local(self.folder)

    def add(self, documents: list[Document]) -> None:
        if self.store is None:
            self.store = FAISS.from_documents(documents, self.embeddings, ids=[document.id for document in documents])
        else:
            super().add(documents)


class InMemoryHost(VectorHost):
    def __init__(self, embeddings: CountingEmbeddings, folder: Path) -> None:
        self.file = f"{folder}.json"
        super().__init__(embeddings)

    def open(self) -> None:
        exists = Path(self.file).exists()
        self.store = InMemoryVectorStore.load(self.file, self.embeddings) if exists else InMemoryVectorStore(self.embeddings)

    def close(self) -> None:
        self.store.dump(self.file)


class DocstoreHost(VectorHost):
    """Not a vector store: a key-value docstore on disk, whose keys are the documents' ids."""

    def __init__(self, embeddings: CountingEmbeddings, folder: Path) -> None:
        self.folder = folder
        super().__init__(embeddings)

    def open(self) -> None:
        self.store = create_kv_docstore(LocalFileStore(self.folder))

    def add(self, documents: list[Document]) -> None:
        self.store.mset([(str(document.id), document) for document in documents])

    def delete(self, ids: list[str | None]) -> None:
        self.store.mdelete(ids)

    def retrieve(self, k: int = 20) -> list[Document]:
        return self.store.mget(sorted(self.store.yield_keys()))[:k]


class TableHost(VectorHost):
    """PGVectorStore with all metadata in its JSON column."""

    columns: tuple[str, ...] = ()
    scheme = "postgresql+psycopg"

    def __init__(self, embeddings: CountingEmbeddings, uri: str) -> None:
        self.uri = uri.replace("postgresql", self.scheme, 1)
        self.table = f"langchain_{uuid4().hex}"
        engine = PGEngine.from_connection_string(self.uri)
        columns = [Column(name, "text") for name in self.columns]
        engine.init_vectorstore_table(self.table, WIDTH, metadata_columns=columns, store_metadata="source" not in self.columns)
        close(engine)
        super().__init__(embeddings)

    def open(self) -> None:
        self.engine = PGEngine.from_connection_string(self.uri)
        self.store = PGVectorStore.create_sync(self.engine, self.embeddings, self.table, metadata_columns=list(self.columns))

    def close(self) -> None:
        close(self.engine)

    def drop(self) -> None:
        self.engine.drop_table(self.table)
        self.close()


class ColumnsHost(TableHost):
    """PGVectorStore with columns for all metadata, through another driver."""

    columns = ("source", ENCODING_KEY, FINGERPRINT_KEY, "kalm_encoding_2", "kalm_encoding_2_fp")
    scheme = "postgresql+asyncpg"


def close(engine: PGEngine) -> None:
    engine._run_as_sync(engine._pool.dispose())


class MilvusHost(VectorHost):
    """Milvus Lite with dynamic fields."""

    def __init__(self, embeddings: CountingEmbeddings, folder: Path) -> None:
        self.uri = f"{folder}.db"
        super().__init__(embeddings)

    def open(self) -> None:
        index = {"index_type": "FLAT", "metric_type": "L2"}
        self.store = Milvus(
            self.embeddings, "kalm", connection_args={"uri": self.uri}, index_params=index, enable_dynamic_field=True
        )

    def close(self) -> None:
        self.store.client.close()
        server_manager_instance.release_server(self.uri)


class LanceDBHost(VectorHost):
    """LanceDB with a table that has the fields of encodings, and whose hits have no ids but what is in their metadata."""

    def __init__(self, embeddings: CountingEmbeddings, folder: Path) -> None:
        self.folder = str(folder)
        fields = ("id", "source", ENCODING_KEY, FINGERPRINT_KEY)
        metadata = pa.struct([pa.field(name, pa.string()) for name in fields])
        columns = {"vector": pa.list_(pa.float32(), WIDTH), "id": pa.string(), "text": pa.string()}
        lancedb.connect(self.folder).create_table("kalm", schema=pa.schema({**columns, "metadata": metadata}))
        super().__init__(embeddings)

    def open(self) -> None:
        self.store = LanceDB(embedding=self.embeddings, uri=self.folder, table_name="kalm", mode="append")

    def add(self, documents: list[Document]) -> None:
        documents = [d.model_copy(update={"metadata": {**d.metadata, "id": d.id}}) for d in documents]
        super().add(documents)


KINDS: dict[str, Callable[..., VectorHost]] = {
    "chroma": ChromaHost,
    "qdrant": QdrantHost,
    "postgres": PostgresHost,
    "table": TableHost,
    "columns": ColumnsHost,
    "milvus": MilvusHost,
    "lancedb": LanceDBHost,
    "faiss": FaissHost,
    "in_memory": InMemoryHost,
    "docstore": DocstoreHost,
}
NEED_A_SERVER = ("postgres", "table", "columns")


@contextmanager
def open_host(
    name: str, embeddings: CountingEmbeddings, folder: Path, postgres_uri: Callable[[], str]
) -> Iterator[VectorHost]:
    """A store of a kind, empty."""
    host = KINDS[name](embeddings, postgres_uri() if name in NEED_A_SERVER else folder / "store")
    try:
        yield host
    finally:
        host.drop()
