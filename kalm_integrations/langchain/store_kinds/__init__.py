"""How each kind of store is read and written, by the name of its class, so that no store's package is imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from langchain_core.stores import BaseStore

from kalm_integrations.langchain.store_kinds.base import StoreAccess
from kalm_integrations.langchain.store_kinds.chroma import ChromaAccess
from kalm_integrations.langchain.store_kinds.lancedb import LanceDBAccess
from kalm_integrations.langchain.store_kinds.memory import FaissAccess, InMemoryAccess, KeyValueAccess
from kalm_integrations.langchain.store_kinds.milvus import MilvusAccess
from kalm_integrations.langchain.store_kinds.postgres import PGVectorAccess, PGVectorStoreAccess
from kalm_integrations.langchain.store_kinds.qdrant import QdrantAccess

KINDS: dict[str, Callable[[Any, str], StoreAccess]] = {
    "langchain_chroma.Chroma": ChromaAccess,
    "langchain_qdrant.QdrantVectorStore": QdrantAccess,
    "langchain_postgres.PGVector": PGVectorAccess,
    "langchain_postgres.PGVectorStore": PGVectorStoreAccess,
    "langchain_milvus.Milvus": MilvusAccess,
    "langchain_community.LanceDB": LanceDBAccess,
    "langchain_community.FAISS": FaissAccess,
    "langchain_core.InMemoryVectorStore": InMemoryAccess,
}
"""Each is called with a store and the metadata key of the encoding."""


def kind_of(store: object) -> Callable[[Any, str], StoreAccess] | None:
    """Return what makes the access to a store; None if it is not known."""
    names = (f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in type(store).__mro__)
    found = next((KINDS[name] for name in names if name in KINDS), None)
    return KeyValueAccess if found is None and isinstance(store, BaseStore) else found
