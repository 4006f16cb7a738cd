"""Encodings into nodes that a store has already, without embedding a text again, and out of them at query time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from llama_index.core.constants import DATA_KEY
from llama_index.core.schema import BaseNode
from llama_index.core.storage.docstore.keyval_docstore import KVDocumentStore
from llama_index.core.vector_stores.types import BasePydanticVectorStore

from kalm_integrations.core.types import ENCODING_KEY
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting import filling, qdrant
from kalm_integrations.hosting import stores as hosting
from kalm_integrations.hosting.documents import check_encoding_key
from kalm_integrations.hosting.filling import DEFAULT_BATCH_SIZE, BackfillReport, Pace
from kalm_integrations.hosting.stores import Changes, DocumentAccess, DocumentId, Label, merged
from kalm_integrations.llama_index.encode import KalmPassageEncoder
from kalm_integrations.llama_index.nodes import node_kind
from kalm_integrations.llama_index.rerank import Fetch, WriteBack

T = TypeVar("T")

_CONTENT = "_node_content"
"""Payload key of the JSON that vector stores read a node from; the metadata beside it serve filters only."""


def write_back_to(store: Any, encoding_key: str = ENCODING_KEY) -> WriteBack:
    """Return a `write_back` for `KalmRerank` that writes encodings into a store, without embedding anything again.

    Only the encoding goes into the store: what other postprocessors made of a node's text and metadata does not. Nodes that
    are gone or have another text by now are passed over; how many, is logged.

    Args:
        store: the document store that the index reads its nodes from (`index.docstore`: simple, Redis, Postgres or another
            one over a key-value store), a `ChromaVectorStore`, a `QdrantVectorStore`, or a `DocumentAccess`.
        encoding_key: that of the reranker.

    Raises:
        SettingsError: it is another kind of store, or `encoding_key` is one of our other keys.
    """
    access, kind = access_to(store), node_kind(check_encoding_key(encoding_key))

    def write_back(nodes: Sequence[BaseNode]) -> None:
        hosting.write_encodings(access, kind, {node.node_id: node for node in nodes})

    return write_back


def fetch_from(store: Any, encoding_key: str = ENCODING_KEY) -> Fetch:
    """Return a `fetch` for `KalmRerank`: by one call it reads the nodes that came without encodings.

    Args:
        store: any vector store with `get_nodes`, or what `write_back_to` takes. It need not be the one that was searched.
        encoding_key: that of the reranker.

    Raises:
        SettingsError: it is another kind of store, or `encoding_key` is one of our other keys.
    """
    is_other = isinstance(store, BasePydanticVectorStore) and _known(store, _VECTOR_STORES) is None
    access: Any = _VectorStore(store) if is_other else access_to(store)
    kind = node_kind(check_encoding_key(encoding_key))

    def fetch(nodes: Sequence[BaseNode]) -> list[Any]:
        return hosting.encodings_of(access, kind, [node.node_id for node in nodes])

    return fetch


def backfill(
    store: Any,
    encoder: KalmPassageEncoder | None = None,
    *,
    check_texts: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
    documents_per_second: float | None = None,
    show_progress: bool = True,
) -> BackfillReport:
    """Encode the nodes of a store that a query would have to encode, in place and without embedding them again.

    Each batch is written when it is done, so a run that was stopped is continued by the next one.

    Args:
        store: as in `write_back_to`.
        encoder: the encoder of the ingestion pipeline; `KalmPassageEncoder()` for None.
        check_texts: read every node. False believes `kalm_fp`: fewer nodes are read, but an encoding that is damaged or of
            another text is not found.
        batch_size: nodes read, encoded and written at a time.
        documents_per_second: at most, so that queries have the store and the model; None goes as fast as it can.
        show_progress: draw a progress bar.

    Raises:
        SettingsError: it is another kind of store, or `batch_size` or `documents_per_second` is not positive.
        EncodingTooLargeError: an encoding does not fit the encoder's `max_inline_bytes`.
        StoreError: the store could not be read.
    """
    access = access_to(store)
    encoder = KalmPassageEncoder() if encoder is None else encoder
    kind, reranker = node_kind(encoder.encoding_key, encoder.metadata_mode), encoder.reranker
    pace = Pace(batch_size, documents_per_second, show_progress)
    return filling.backfill(access, kind, reranker, check_texts=check_texts, pace=pace)


def access_to(store: Any) -> DocumentAccess[BaseNode]:
    """Return the access to a store.

    Raises:
        SettingsError: there is none.
    """
    if isinstance(store, DocumentAccess):
        return store
    if isinstance(store, KVDocumentStore):
        return _DocumentStore(store)
    if kind := _known(store, _VECTOR_STORES):
        return kind(store)
    msg = (
        f"store must be a document store over a key-value store, {', '.join(_VECTOR_STORES)} or a DocumentAccess, but got "
        f"{type(store).__name__}; write a DocumentAccess for it, or pass a function of your own as write_back"
    )
    raise SettingsError(msg)


class _DocumentStore:
    """Changes entries of the key-value store below.

    `add_documents` would replace whole nodes, and write anew what the store knows of their source documents and the hashes by
    which pipelines know what they have ingested.
    """

    def __init__(self, store: KVDocumentStore) -> None:
        self._store = store
        self._kvstore: Any = store._kvstore  # noqa: SLF001
        self._collection = store._node_collection  # noqa: SLF001
        self._change = _known(self._kvstore, _ENTRY_CHANGES) or _change_entry

    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        entries: dict[str, Any] = self._kvstore.get_all(collection=self._collection)
        return [i for i, entry in entries.items() if without is None or not without.is_on(entry[DATA_KEY].get("metadata", {}))]

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, BaseNode]:
        return {node.node_id: node for node in self._store.get_nodes([str(i) for i in ids], raise_error=False)}

    def add_metadata(self, changes: Changes) -> None:
        for document_id, added in changes.items():
            self._change(self._kvstore, self._collection, str(document_id), added)


def _change_entry(kvstore: Any, collection: str, key: str, added: Mapping[str, str | None]) -> None:
    # All that the interface of key-value stores offers.
    if entry := kvstore.get(key, collection=collection):
        _add(entry[DATA_KEY], added)
        kvstore.put(key, entry, collection=collection)


def _change_in_memory(kvstore: Any, collection: str, key: str, added: Mapping[str, str | None]) -> None:
    # `get` returns a new dict with the node that is stored. Nothing is put, so an entry that has taken its place stays.
    if entry := kvstore.get(key, collection=collection):
        _add(entry[DATA_KEY], added)


_REDIS_SET_IF_SAME = """
if redis.call('hget', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('hset', KEYS[1], ARGV[1], ARGV[3])
return 1
"""


def _change_in_redis(kvstore: Any, collection: str, key: str, added: Mapping[str, str | None]) -> None:
    client = kvstore._redis_client  # noqa: SLF001
    while (held := client.hget(collection, key)) is not None:
        entry = json.loads(held)
        _add(entry[DATA_KEY], added)
        if client.eval(_REDIS_SET_IF_SAME, 1, collection, key, held, json.dumps(entry)):
            return


def _change_in_postgres(kvstore: Any, collection: str, key: str, added: Mapping[str, str | None]) -> None:
    with kvstore._session() as session, session.begin():  # noqa: SLF001
        rows = session.query(kvstore._table_class).filter_by(namespace=collection, key=key)  # noqa: SLF001
        for row in rows.with_for_update():
            node = dict(row.value[DATA_KEY])
            _add(node, added)
            row.value = {**row.value, DATA_KEY: node}


_ENTRY_CHANGES: dict[str, Callable[[Any, str, str, Mapping[str, str | None]], None]] = {
    "SimpleKVStore": _change_in_memory,
    "RedisKVStore": _change_in_redis,
    "PostgresKVStore": _change_in_postgres,
}


class _VectorStore:
    def __init__(self, store: Any) -> None:
        self._store = store

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, BaseNode]:
        return {node.node_id: node for node in self._store.get_nodes(list(ids))}


class _Chroma(_VectorStore):
    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        where = None if without is None else {without.key: {"$ne": without.fingerprint}}
        return list(self._store.client.get(where=where, include=[])["ids"])

    def add_metadata(self, changes: Changes) -> None:
        # Chroma writes nothing on a condition, so what it holds is read at the last moment.
        held = self._store.client.get(ids=list(changes), include=["metadatas"])
        payloads = [_payload(payload or {}, changes[i]) for i, payload in zip(held["ids"], held["metadatas"], strict=True)]
        if payloads:
            self._store.client.update(held["ids"], metadatas=payloads)


class _Qdrant(_VectorStore):
    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        return map(str, qdrant.find_ids(self._store.client, self._store.collection_name, None, without))

    def add_metadata(self, changes: Changes) -> None:
        client, collection = self._store.client, self._store.collection_name
        written = []
        for point in client.retrieve(collection, list(changes)):
            # What is written holds the whole node: it must still be the one that was read.
            unchanged = (_CONTENT, point.payload[_CONTENT]) if _CONTENT in point.payload else None
            written.append(qdrant.PayloadChange(point.id, _payload(point.payload, changes[str(point.id)]), unchanged))
        qdrant.add_payloads(client, collection, written)


_VECTOR_STORES: dict[str, Callable[[Any], DocumentAccess[BaseNode]]] = {
    "ChromaVectorStore": _Chroma,
    "QdrantVectorStore": _Qdrant,
}


def _known(store: object, kinds: Mapping[str, T]) -> T | None:
    """Look up a store's class by name: this package does not need those of the stores."""
    return next((kinds[base.__name__] for base in type(store).__mro__ if base.__name__ in kinds), None)


def _payload(held: Mapping[str, Any], added: Mapping[str, str | None]) -> dict[str, Any]:
    """Return what to merge into a vector store's payload of a node."""
    if _CONTENT not in held:
        # Not written by the framework, which then reads the payload itself as metadata.
        return dict(added)
    node = json.loads(held[_CONTENT])
    _add(node, added)
    return {**added, _CONTENT: json.dumps(node, ensure_ascii=False)}


def _add(node: dict[str, Any], added: Mapping[str, str | None]) -> None:
    """Add metadata to a node's JSON; what is hidden from prompts and embeddings is hidden before it is there."""
    for hidden in ("excluded_embed_metadata_keys", "excluded_llm_metadata_keys"):
        node[hidden] = list(dict.fromkeys([*node[hidden], *added]))
    # A new dict: a reader may be going through the old one.
    node["metadata"] = merged(node["metadata"], added)
