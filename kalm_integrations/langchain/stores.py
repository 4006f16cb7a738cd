"""Encodings into documents that a store has already, and out of them, through each store's own API and without embedding."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from langchain_core.documents import Document
from langchain_core.stores import BaseStore
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore

from kalm_integrations.core.types import ENCODING_KEY
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting import filling, qdrant
from kalm_integrations.hosting import stores as hosting
from kalm_integrations.hosting.documents import check_encoding_key
from kalm_integrations.hosting.filling import DEFAULT_BATCH_SIZE, BackfillReport, Pace
from kalm_integrations.hosting.stores import Changes, DocumentId, Label, merged
from kalm_integrations.langchain.documents import document_kind, with_metadata
from kalm_integrations.langchain.encode import KalmPassageEncoder

_READ_BATCH = 100


@runtime_checkable
class DocumentAccess(hosting.DocumentAccess[Document], Protocol):
    """What write-back and backfill need of a store; implement it for a store that is not known here."""

    def id_of(self, document: Document) -> DocumentId | None:
        """Return the id under which the store holds a document that it returned."""


def write_back_to(
    store: object,
    *,
    encoding_key: str = ENCODING_KEY,
    id_of: Callable[[Document], DocumentId | None] | None = None,
) -> Callable[[Sequence[Document]], None]:
    """Return what `KalmRerank(write_back=...)` takes, for a store.

    Documents that are gone, have another text by now or have no id are passed over; how many, is logged.

    Args:
        store: Chroma, QdrantVectorStore, PGVector (sync), FAISS, InMemoryVectorStore, a key-value docstore, or a
            `DocumentAccess`. It is changed in memory where it lives in memory: save FAISS yourself.
        encoding_key: metadata key of the encoding.
        id_of: finds the store's id of a document where the document's own is not it, as with a key-value docstore whose
            keys are in the metadata.

    Raises:
        SettingsError: the store is none of these.
    """
    access = access_to(store)
    kind = document_kind(check_encoding_key(encoding_key))
    find_id = access.id_of if id_of is None else id_of

    def write_back(documents: Sequence[Document]) -> None:
        ids = [find_id(document) for document in documents]
        found = {i: document for i, document in zip(ids, documents, strict=True) if i is not None}
        hosting.write_encodings(access, kind, found, n_without_id=ids.count(None))

    return write_back


def fetch_from(
    store: object,
    *,
    encoding_key: str = ENCODING_KEY,
    id_of: Callable[[Document], DocumentId | None] | None = None,
) -> Callable[[Sequence[Document]], list[Any]]:
    """Return what `KalmRerank(fetch=...)` takes, for a store: by one call it reads the documents that came without encodings.

    Args:
        store: any vector store with `get_by_ids`, or what `write_back_to` takes. It need not be the one that was searched.
        encoding_key: metadata key of the encoding.
        id_of: finds the store's id of a document; see `write_back_to`.

    Raises:
        SettingsError: the store is none of these.
    """
    is_other = isinstance(store, VectorStore) and _kind_of(store) is None and not isinstance(store, DocumentAccess)
    access: Any = _ById(store) if is_other else access_to(store)
    kind = document_kind(check_encoding_key(encoding_key))
    find_id = access.id_of if id_of is None else id_of

    def fetch(documents: Sequence[Document]) -> list[Any]:
        return hosting.encodings_of(access, kind, [find_id(document) for document in documents])

    return fetch


def backfill(
    store: object,
    encoder: KalmPassageEncoder | None = None,
    *,
    check_texts: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
    documents_per_second: float | None = None,
    show_progress: bool = True,
) -> BackfillReport:
    """Encode a store's documents that a query would have to encode, in place and without embedding them again.

    Each batch is written when it is done, so a run that was stopped is continued by the next one.

    Args:
        store: what `write_back_to` takes.
        encoder: brings model and settings; `KalmPassageEncoder()` for None.
        check_texts: read every document. False believes `kalm_fp`: fewer documents are read, but an encoding that is damaged
            or of another text is not found.
        batch_size: documents read, encoded and written at a time.
        documents_per_second: at most, so that queries have the store and the model; None goes as fast as it can.
        show_progress: draw a progress bar.

    Raises:
        SettingsError: the store is not known, or `batch_size` or `documents_per_second` is not positive.
        EncodingTooLargeError: an encoding does not fit `max_inline_bytes`.
        StoreError: the store could not be read.
    """
    access = access_to(store)
    encoder = KalmPassageEncoder() if encoder is None else encoder
    kind, reranker = document_kind(encoder.encoding_key), encoder.reranker
    pace = Pace(batch_size, documents_per_second, show_progress)
    return filling.backfill(access, kind, reranker, check_texts=check_texts, pace=pace)


def access_to(store: object) -> DocumentAccess:
    """Return the access to a store.

    Raises:
        SettingsError: there is none.
    """
    if isinstance(store, DocumentAccess):
        return store
    kind = _kind_of(store)
    if kind is not None:
        return kind(store)
    if isinstance(store, BaseStore):
        return _KeyValue(store)
    msg = (
        f"store must be a key-value docstore, a DocumentAccess or one of {', '.join(_KINDS)}, but got {type(store).__name__}; "
        "write a DocumentAccess for it"
    )
    raise SettingsError(msg)


def _kind_of(store: object) -> Callable[[Any], DocumentAccess] | None:
    names = (f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in type(store).__mro__)
    return next((_KINDS[name] for name in names if name in _KINDS), None)


class _ById:
    """Any vector store, for reading only."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Document]:
        return {document.id: document for document in self._store.get_by_ids([str(i) for i in ids])}

    def id_of(self, document: Document) -> DocumentId | None:
        return document.id


class _Chroma:
    def __init__(self, store: Any) -> None:
        self._store = store

    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        where = None if without is None else {without.key: {"$ne": without.fingerprint}}
        return list(self._store.get(where=where, include=[])["ids"])

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Document]:
        found = self._store.get(ids=list(ids), include=["documents", "metadatas"])
        rows = zip(found["ids"], found["documents"], found["metadatas"], strict=True)
        return {i: Document(text, id=i, metadata=metadata or {}) for i, text, metadata in rows if text is not None}

    def id_of(self, document: Document) -> DocumentId | None:
        return document.id

    def add_metadata(self, changes: Changes) -> None:
        # Chroma.update_documents would embed again; the collection's update merges metadata.
        self._store._collection.update(ids=list(changes), metadatas=[dict(c) for c in changes.values()])  # noqa: SLF001


class _Qdrant:
    def __init__(self, store: Any) -> None:
        self._store = store

    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        return qdrant.find_ids(self._store.client, self._store.collection_name, self._store.metadata_payload_key, without)

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Document]:
        points = self._store.client.retrieve(self._store.collection_name, list(ids))
        text_key, metadata_key = self._store.content_payload_key, self._store.metadata_payload_key
        return {
            point.id: Document(point.payload[text_key], id=str(point.id), metadata=point.payload.get(metadata_key) or {})
            for point in points
            if point.payload.get(text_key) is not None
        }

    def id_of(self, document: Document) -> DocumentId | None:
        # The store leaves Document.id empty and writes the id here.
        found: DocumentId | None = document.metadata.get("_id", document.id)
        return found

    def add_metadata(self, changes: Changes) -> None:
        written = [qdrant.PayloadChange(document_id, added) for document_id, added in changes.items()]
        qdrant.add_payloads(self._store.client, self._store.collection_name, written, self._store.metadata_payload_key)


class _PGVector:
    """In SQL, because PGVector's own `add_documents(ids=...)` replaces all metadata and embeds again."""

    def __init__(self, store: Any) -> None:
        if store.async_mode:
            msg = "PGVector must be in sync mode to be written to, but got async_mode=True; open it again without"
            raise SettingsError(msg)
        self._store = store
        self._text: Any = import_module("sqlalchemy").text
        self._table = store.EmbeddingStore.__tablename__

    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        outdated = "" if without is None else "and cmetadata ->> :key is distinct from :fingerprint"
        query = f"select id from {self._table} where collection_id = :collection {outdated}"
        return [row.id for row in self._select(query, {} if without is None else asdict(without))]

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Document]:
        query = (
            f"select id, document, cmetadata from {self._table} "
            "where collection_id = :collection and id = any(:ids) and document is not null"
        )
        rows = self._select(query, {"ids": list(ids)})
        return {row.id: Document(row.document, id=row.id, metadata=row.cmetadata or {}) for row in rows}

    def id_of(self, document: Document) -> DocumentId | None:
        return document.id

    def add_metadata(self, changes: Changes) -> None:
        statement = self._text(
            f"update {self._table} set cmetadata = coalesce(cmetadata, '{{}}') || cast(:added as jsonb) "
            "where collection_id = :collection and id = :id"
        )
        with self._store._make_sync_session() as session:  # noqa: SLF001
            collection = self._store.get_collection(session).uuid
            rows = [{"id": i, "added": json.dumps(dict(added)), "collection": collection} for i, added in changes.items()]
            session.execute(statement, rows)
            session.commit()

    def _select(self, query: str, values: dict[str, Any]) -> list[Any]:
        with self._store._make_sync_session() as session:  # noqa: SLF001
            collection = self._store.get_collection(session).uuid
            return list(session.execute(self._text(query), {**values, "collection": collection}))


class _Replacing(ABC):
    """A store that keeps whole documents: each is read anew at the moment when it is written."""

    @abstractmethod
    def _all_ids(self) -> list[DocumentId]: ...

    @abstractmethod
    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Document]: ...

    @abstractmethod
    def _add(self, document_id: DocumentId, added: Mapping[str, str | None]) -> None: ...

    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        ids = self._all_ids()
        if without is None:
            return ids
        batches = (self.read(ids[start : start + _READ_BATCH]) for start in range(0, len(ids), _READ_BATCH))
        return [i for batch in batches for i, document in batch.items() if not without.is_on(document.metadata)]

    def id_of(self, document: Document) -> DocumentId | None:
        return document.id

    def add_metadata(self, changes: Changes) -> None:
        for document_id, added in changes.items():
            self._add(document_id, added)


class _InMemory(_Replacing):
    def __init__(self, store: InMemoryVectorStore) -> None:
        self._entries = store.store

    def _all_ids(self) -> list[DocumentId]:
        return list(self._entries)

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Document]:
        held = {i: self._entries[str(i)] for i in ids if i in self._entries}
        return {i: Document(entry["text"], id=entry["id"], metadata=entry["metadata"]) for i, entry in held.items()}

    def _add(self, document_id: DocumentId, added: Mapping[str, str | None]) -> None:
        # The entry that is there is changed: one that replaces it meanwhile stays. Its old metadata a query may still hold.
        if entry := self._entries.get(str(document_id)):
            entry["metadata"] = merged(entry["metadata"], added)


class _Faiss(_Replacing):
    def __init__(self, store: Any) -> None:
        # Its add() refuses ids that are there, and delete() before it would let a query find nothing.
        if not isinstance(getattr(store.docstore, "_dict", None), dict):
            msg = f"the docstore of FAISS must be an InMemoryDocstore, but got {type(store.docstore).__name__}"
            raise SettingsError(msg)
        self._docstore = store.docstore

    @property
    def _held(self) -> dict[DocumentId, Document]:
        # A new one with every addition.
        held: dict[DocumentId, Document] = self._docstore._dict  # noqa: SLF001
        return held

    def _all_ids(self) -> list[DocumentId]:
        return list(self._held)

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Document]:
        return {i: self._held[i] for i in ids if i in self._held}

    def _add(self, document_id: DocumentId, added: Mapping[str, str | None]) -> None:
        # A copy takes its place: queries are given the very object that is stored.
        if document := self._held.get(document_id):
            self._held[document_id] = with_metadata(document, merged(document.metadata, added))


class _KeyValue(_Replacing):
    def __init__(self, store: BaseStore[str, Any]) -> None:
        self._store = store

    def _all_ids(self) -> list[DocumentId]:
        return list(self._store.yield_keys())

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Document]:
        held: dict[DocumentId, Document] = {}
        for i, value in zip(ids, self._store.mget([str(i) for i in ids]), strict=True):
            if isinstance(value, Document):
                held[i] = value
            elif value is not None:
                msg = f"a docstore must hold Documents, but got {type(value).__name__}; use create_kv_docstore"
                raise SettingsError(msg)
        return held

    def _add(self, document_id: DocumentId, added: Mapping[str, str | None]) -> None:
        for document in self.read([document_id]).values():
            self._store.mset([(str(document_id), with_metadata(document, merged(document.metadata, added)))])


# By name, so that no store's package is imported.
_KINDS: dict[str, Callable[[Any], DocumentAccess]] = {
    "langchain_chroma.Chroma": _Chroma,
    "langchain_qdrant.QdrantVectorStore": _Qdrant,
    "langchain_postgres.PGVector": _PGVector,
    "langchain_community.FAISS": _Faiss,
    "langchain_core.InMemoryVectorStore": _InMemory,
}
