"""Real stores behind one face: filled, closed, opened again, weighed and asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import chromadb
import numpy as np
import psycopg
import redis as redis_client
from langchain_chroma import Chroma
from langchain_community.vectorstores import FAISS
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_postgres import PGVector
from langchain_qdrant import QdrantVectorStore
from llama_index.core.schema import TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import VectorStoreQuery
from llama_index.storage.docstore.redis import RedisDocumentStore
from llama_index.storage.kvstore.redis import RedisKVStore
from llama_index.vector_stores.chroma import ChromaVectorStore
from llama_index.vector_stores.qdrant import QdrantVectorStore as LlamaQdrant
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, VectorParams
from tools import servers

from kalm_integrations.core.passages.stores import LmdbPayloadStore
from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY

VECTOR_WIDTH = 384
BATCH = 100
"""Passages that are added at a time, as an ingest would."""

FINGERPRINT = "0" * 32


@dataclass(frozen=True)
class Row:
    """A passage to be stored."""

    key: str
    text: str
    value: str | bytes | None
    """Its encoding: the metadata string, or what a payload store holds."""

    @property
    def metadata(self) -> dict[str, Any]:
        source = {"source": "page"}
        return source if self.value is None else {**source, ENCODING_KEY: self.value, FINGERPRINT_KEY: FINGERPRINT}


class RandomEmbeddings(Embeddings):
    """Vectors that need no model."""

    def __init__(self, width: int) -> None:
        self.draw = np.random.default_rng(0)
        self.width = width

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return self.draw.standard_normal(self.width).tolist()


class Kind:
    """A store in a folder of its own."""

    name: str
    holds_payloads: ClassVar[bool] = False
    """Whether it holds payloads as bytes, with references in the host's metadata."""
    vector_width: ClassVar[int] = VECTOR_WIDTH

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.embeddings = RandomEmbeddings(self.vector_width)
        self.open()

    def open(self) -> None:
        """Open, or make, the store."""

    def add(self, rows: Sequence[Row]) -> None:
        """Add a batch."""

    def close(self) -> None:
        """Write what is not yet on disk, and let go."""

    def fetch(self, k: int) -> Sequence[Any]:
        """Search for k passages, or get k by their keys where the store has no vectors."""
        raise NotImplementedError

    def weigh(self) -> dict[str, int]:
        """Return bytes by where they are; called between `close` and `open`."""
        return {"disk": sum(path.stat().st_blocks * 512 for path in self.folder.rglob("*") if path.is_file())}

    def end(self) -> None:
        """Stop what `open` started."""
        self.close()


class LangChainKind(Kind):
    store: Any

    def add(self, rows: Sequence[Row]) -> None:
        documents = [Document(row.text, id=row.key, metadata=row.metadata) for row in rows]
        self.store.add_documents(documents, ids=[row.key for row in rows])

    def fetch(self, k: int) -> Sequence[Any]:
        return self.store.similarity_search("what?", k=k)


class LangChainChroma(LangChainKind):
    name = "Chroma"

    def open(self) -> None:
        self.store = Chroma("kalm", self.embeddings, persist_directory=str(self.folder))


class LangChainQdrant(LangChainKind):
    name = "Qdrant, local"

    def open(self) -> None:
        self.client = QdrantClient(path=str(self.folder))
        if not self.client.collection_exists("kalm"):
            self.client.create_collection(
                "kalm", vectors_config=VectorParams(size=self.vector_width, distance=Distance.COSINE)
            )
        self.store = QdrantVectorStore(self.client, "kalm", self.embeddings, validate_collection_config=False)

    def close(self) -> None:
        self.client.close()


class LangChainFaiss(LangChainKind):
    name = "FAISS"

    def open(self) -> None:
        self.store = None
        if (self.folder / "index.faiss").exists():
            self.store = FAISS.load_local(str(self.folder), self.embeddings, allow_dangerous_deserialization=True)

    def add(self, rows: Sequence[Row]) -> None:
        if self.store is None:
            documents = [Document(row.text, id=row.key, metadata=row.metadata) for row in rows]
            self.store = FAISS.from_documents(documents, self.embeddings, ids=[row.key for row in rows])
        else:
            super().add(rows)

    def close(self) -> None:
        self.store.save_local(str(self.folder))


class LangChainInMemory(LangChainKind):
    name = "InMemoryVectorStore"

    def open(self) -> None:
        self.file = str(self.folder / "store.json")
        exists = Path(self.file).exists()
        self.store = InMemoryVectorStore.load(self.file, self.embeddings) if exists else InMemoryVectorStore(self.embeddings)

    def close(self) -> None:
        self.store.dump(self.file)


class LangChainPostgres(LangChainKind):
    """A database of its own on the server; tables, TOAST and indexes are weighed, the write-ahead log is not."""

    name = "PGVector"

    def __init__(self, folder: Path, uri: str) -> None:
        database = f"kalm_{uuid4().hex}"
        with psycopg.connect(uri, autocommit=True) as connection:
            connection.execute(f"create database {database}")
        self.uri = uri.replace("/postgres?", f"/{database}?")
        super().__init__(folder)

    def open(self) -> None:
        uri = self.uri.replace("postgresql://", "postgresql+psycopg://")
        self.store = PGVector(self.embeddings, connection=uri, collection_name="kalm", embedding_length=self.vector_width)

    def close(self) -> None:
        self.store._engine.dispose()

    def weigh(self) -> dict[str, int]:
        with psycopg.connect(self.uri) as connection:
            [size] = connection.execute("select pg_total_relation_size('langchain_pg_embedding')").fetchone()
        return {"disk": size}


class LlamaKind(Kind):
    store: Any

    def add(self, rows: Sequence[Row]) -> None:
        self.store.add(
            [
                TextNode(id_=row.key, text=row.text, metadata=row.metadata, embedding=self.embeddings.embed_query(row.text))
                for row in rows
            ]
        )

    def fetch(self, k: int) -> Sequence[Any]:
        return self.store.query(VectorStoreQuery(self.embeddings.embed_query("what?"), similarity_top_k=k)).nodes


class LlamaIndexChroma(LlamaKind):
    name = "Chroma, LlamaIndex"

    def open(self) -> None:
        collection = chromadb.PersistentClient(str(self.folder)).get_or_create_collection("kalm")
        self.store = ChromaVectorStore(chroma_collection=collection)


class LlamaIndexQdrant(LlamaKind):
    name = "Qdrant, local, LlamaIndex"

    def open(self) -> None:
        self.client = QdrantClient(path=str(self.folder))
        self.store = LlamaQdrant("kalm", client=self.client)

    def close(self) -> None:
        self.client.close()


class DocstoreKind(Kind):
    """Holds no vectors: a query gets the nodes that an index found by their keys."""

    store: Any

    def __init__(self, folder: Path) -> None:
        self.keys: list[str] = []
        super().__init__(folder)

    def add(self, rows: Sequence[Row]) -> None:
        self.store.add_documents([TextNode(id_=row.key, text=row.text, metadata=row.metadata) for row in rows])
        self.keys += [row.key for row in rows]

    def draw(self, k: int) -> list[str]:
        return self.embeddings.draw.choice(self.keys, k, replace=False).tolist()

    def fetch(self, k: int) -> Sequence[Any]:
        return self.store.get_nodes(self.draw(k))


class LlamaIndexSimple(DocstoreKind):
    name = "SimpleDocumentStore"

    def open(self) -> None:
        self.file = str(self.folder / "docstore.json")
        exists = Path(self.file).exists()
        self.store = SimpleDocumentStore.from_persist_path(self.file) if exists else SimpleDocumentStore()

    def close(self) -> None:
        self.store.persist(self.file)


class LlamaIndexRedis(DocstoreKind):
    """A server of its own; the disk holds what SAVE writes."""

    name = "Redis"

    def __init__(self, folder: Path) -> None:
        self.server = servers.redis(folder)
        self.url, _ = self.server.__enter__()
        self.client = redis_client.Redis.from_url(self.url)
        super().__init__(folder)

    def open(self) -> None:
        self.store = RedisDocumentStore(RedisKVStore(redis_uri=self.url), namespace="kalm")

    def close(self) -> None:
        self.client.save()

    def weigh(self) -> dict[str, int]:
        return {**super().weigh(), "memory": self.client.info("memory")["used_memory"]}

    def end(self) -> None:
        self.server.__exit__(None, None, None)


class Lmdb(DocstoreKind):
    name = "LMDB payload store"
    holds_payloads = True

    def open(self) -> None:
        self.store = LmdbPayloadStore(self.folder)

    def add(self, rows: Sequence[Row]) -> None:
        self.store.update({row.key: row.value for row in rows if row.value is not None})
        self.keys += [row.key for row in rows]

    def close(self) -> None:
        self.store = None

    def fetch(self, k: int) -> Sequence[Any]:
        return [self.store.get(key) for key in self.draw(k)]


@contextmanager
def all_kinds() -> Iterator[dict[str, Callable[[Path], Kind]]]:
    """What makes a store of each kind, by its name; a server that several share runs meanwhile."""
    kinds = (
        LangChainChroma,
        LangChainQdrant,
        LangChainFaiss,
        LangChainInMemory,
        LlamaIndexChroma,
        LlamaIndexQdrant,
        LlamaIndexRedis,
        LlamaIndexSimple,
        Lmdb,
    )
    with servers.postgres() as uri:
        yield {LangChainPostgres.name: partial(LangChainPostgres, uri=uri), **{kind.name: kind for kind in kinds}}
