"""Reading and changing documents' metadata through each store's own API, without embedding a text again."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol, TypeAlias, runtime_checkable

from langchain_core.documents import Document
from langchain_core.stores import BaseStore
from langchain_core.vectorstores import InMemoryVectorStore

from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY
from kalm_integrations.errors import SettingsError
from kalm_integrations.langchain.documents import with_metadata

logger = logging.getLogger(__name__)

DocumentId: TypeAlias = "str | int"
Changes: TypeAlias = Mapping[DocumentId, Mapping[str, str]]
"""Metadata to add, by document."""

_READ_BATCH = 100


@runtime_checkable
class DocumentAccess(Protocol):
    """What write-back and backfill need of a store; implement it for a store that is not known here."""

    def find_ids(self, fingerprint: str | None) -> list[DocumentId]:
        """Return the ids of the documents whose `kalm_fp` is missing or another; of all documents for None."""

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Document]:
        """Return documents by id, leaving out those that are gone or have no text."""

    def id_of(self, document: Document) -> DocumentId | None:
        """Return the id under which the store holds a document that it returned."""

    def add_metadata(self, changes: Changes) -> None:
        """Add to the metadata of one or more documents, leaving all else as it is; ids that are gone are passed over."""


def write_back_to(
    store: object,
    *,
    encoding_key: str = ENCODING_KEY,
    id_of: Callable[[Document], DocumentId | None] | None = None,
) -> Callable[[Sequence[Document]], None]:
    """Return what `KalmRerank(write_back=...)` takes, for a store.

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
    find_id = access.id_of if id_of is None else id_of

    def write_back(documents: Sequence[Document]) -> None:
        ids = [find_id(document) for document in documents]
        changes = {
            document_id: {key: document.metadata[key] for key in (encoding_key, FINGERPRINT_KEY)}
            for document_id, document in zip(ids, documents, strict=True)
            if document_id is not None
        }
        if changes:
            access.add_metadata(changes)
        if None in ids:
            rule = "%d of %d encodings were not written back: their documents have no id"
            logger.warning(rule, ids.count(None), len(ids))

    return write_back


def access_to(store: object) -> DocumentAccess:
    """Return the access to a store.

    Raises:
        SettingsError: there is none.
    """
    if isinstance(store, DocumentAccess):
        return store
    for base in type(store).__mro__:
        kind = _KINDS.get(f"{base.__module__.partition('.')[0]}.{base.__name__}")
        if kind is not None:
            return kind(store)
    if isinstance(store, BaseStore):
        return _KeyValue(store)
    msg = (
        f"store must be a key-value docstore, a DocumentAccess or one of {', '.join(_KINDS)}, but got {type(store).__name__}; "
        "write a DocumentAccess for it"
    )
    raise SettingsError(msg)


class _Chroma:
    def __init__(self, store: Any) -> None:
        self._store = store

    def find_ids(self, fingerprint: str | None) -> list[DocumentId]:
        where = None if fingerprint is None else {FINGERPRINT_KEY: {"$ne": fingerprint}}
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
        self._models: Any = import_module("qdrant_client.models")

    def find_ids(self, fingerprint: str | None) -> list[DocumentId]:
        outdated = None
        if fingerprint is not None:
            models, key = self._models, f"{self._store.metadata_payload_key}.{FINGERPRINT_KEY}"
            current = models.FieldCondition(key=key, match=models.MatchValue(value=fingerprint))
            outdated = models.Filter(must_not=[current])
        ids: list[DocumentId] = []
        offset = None
        while True:
            points, offset = self._store.client.scroll(
                self._store.collection_name, outdated, limit=1000, offset=offset, with_payload=False
            )
            ids += [point.id for point in points]
            if offset is None:
                return ids

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
        models, key = self._models, self._store.metadata_payload_key
        client, collection = self._store.client, self._store.collection_name
        # The client's local mode stops at a point that is gone.
        held = client.retrieve(collection, list(changes), with_payload=False)
        operations = [
            models.SetPayloadOperation(
                set_payload=models.SetPayload(payload=dict(changes[point.id]), points=[point.id], key=key)
            )
            for point in held
        ]
        if operations:
            client.batch_update_points(collection, operations)


class _PGVector:
    """In SQL, because PGVector's own `add_documents(ids=...)` replaces all metadata and embeds again."""

    def __init__(self, store: Any) -> None:
        if store.async_mode:
            msg = "PGVector must be in sync mode to be written to, but got async_mode=True; open it again without"
            raise SettingsError(msg)
        self._store = store
        self._text: Any = import_module("sqlalchemy").text
        self._table = store.EmbeddingStore.__tablename__

    def find_ids(self, fingerprint: str | None) -> list[DocumentId]:
        outdated = "" if fingerprint is None else f"and cmetadata ->> '{FINGERPRINT_KEY}' is distinct from :fingerprint"
        query = f"select id from {self._table} where collection_id = :collection {outdated}"
        return [row.id for row in self._select(query, {"fingerprint": fingerprint} if outdated else {})]

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
    """A store that keeps whole documents. Copies replace them: a query may still hold the old ones."""

    @abstractmethod
    def _all_ids(self) -> list[DocumentId]: ...

    @abstractmethod
    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Document]: ...

    @abstractmethod
    def _replace(self, documents: dict[DocumentId, Document]) -> None: ...

    def find_ids(self, fingerprint: str | None) -> list[DocumentId]:
        ids = self._all_ids()
        if fingerprint is None:
            return ids
        batches = (self.read(ids[start : start + _READ_BATCH]) for start in range(0, len(ids), _READ_BATCH))
        return [
            i for batch in batches for i, document in batch.items() if document.metadata.get(FINGERPRINT_KEY) != fingerprint
        ]

    def id_of(self, document: Document) -> DocumentId | None:
        return document.id

    def add_metadata(self, changes: Changes) -> None:
        held = self.read(list(changes))
        self._replace({i: with_metadata(document, {**document.metadata, **changes[i]}) for i, document in held.items()})


class _InMemory(_Replacing):
    def __init__(self, store: InMemoryVectorStore) -> None:
        self._entries = store.store

    def _all_ids(self) -> list[DocumentId]:
        return list(self._entries)

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Document]:
        held = {i: self._entries[str(i)] for i in ids if i in self._entries}
        return {i: Document(entry["text"], id=entry["id"], metadata=entry["metadata"]) for i, entry in held.items()}

    def _replace(self, documents: dict[DocumentId, Document]) -> None:
        for i, document in documents.items():
            self._entries[str(i)] = {**self._entries[str(i)], "metadata": document.metadata}


class _Faiss(_Replacing):
    def __init__(self, store: Any) -> None:
        # Its add() refuses ids that are there, and delete() before it would let a query find nothing.
        if not isinstance(getattr(store.docstore, "_dict", None), dict):
            msg = f"the docstore of FAISS must be an InMemoryDocstore, but got {type(store.docstore).__name__}"
            raise SettingsError(msg)
        self._docstore = store.docstore

    def _all_ids(self) -> list[DocumentId]:
        return list(self._docstore._dict)  # noqa: SLF001

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Document]:
        held = self._docstore._dict  # noqa: SLF001
        return {i: held[i] for i in ids if i in held}

    def _replace(self, documents: dict[DocumentId, Document]) -> None:
        self._docstore._dict.update(documents)  # noqa: SLF001


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

    def _replace(self, documents: dict[DocumentId, Document]) -> None:
        self._store.mset([(str(i), document) for i, document in documents.items()])


# By name, so that no store's package is imported.
_KINDS: dict[str, Callable[[Any], DocumentAccess]] = {
    "langchain_chroma.Chroma": _Chroma,
    "langchain_qdrant.QdrantVectorStore": _Qdrant,
    "langchain_postgres.PGVector": _PGVector,
    "langchain_community.FAISS": _Faiss,
    "langchain_core.InMemoryVectorStore": _InMemory,
}
