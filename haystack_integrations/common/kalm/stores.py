"""Encodings into documents that a document store has already, without embedding a text again, and out of them."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib import import_module
from typing import Any
from weakref import WeakValueDictionary

from haystack import Document

from haystack_integrations.common.kalm.documents import DocumentLayout
from kalm_integrations.core.types import ENCODING_KEY
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting import qdrant
from kalm_integrations.hosting.documents import check_encoding_key
from kalm_integrations.hosting.stores import (
    PAGE_SIZE,
    Changes,
    DocumentAccess,
    DocumentId,
    Label,
    PagedIds,
    encodings_of,
    merged,
    split_change,
)

Filters = dict[str, Any]
_Changes = Mapping[str, Mapping[str, "str | None"]]

# One lock for each store that has a connection of its own: see `_OneAtATime`. Nothing that may hang is done under the lock of
# the locks.
_locks: WeakValueDictionary[int, threading.Lock] = WeakValueDictionary()
_locks_lock = threading.Lock()


def _renew_locks() -> None:
    """Forget the locks in a forked child, where the threads that hold them are not."""
    global _locks, _locks_lock
    _locks, _locks_lock = WeakValueDictionary(), threading.Lock()


os.register_at_fork(after_in_child=_renew_locks)


def check_updatable(document_store: Any) -> Any:
    """Return a store if it can update the meta of a document in place.

    Raises:
        SettingsError: it has no `update_by_filter`, which the `DocumentStore` protocol does not demand.
    """
    if document_store is not None and not callable(getattr(document_store, "update_by_filter", None)):
        msg = (
            f"document_store must have update_by_filter, but {type(document_store).__name__} has not; "
            "write the documents with its own API, in a callable passed as write_back"
        )
        raise SettingsError(msg)
    return document_store


def access_to(document_store: Any, filters: Filters | None = None) -> DocumentAccess[Document]:
    """Return the access to a store, restricted to documents that match filters.

    Raises:
        SettingsError: the store has no `update_by_filter`.
    """
    return _kind_of(document_store)(check_updatable(document_store), filters)


def fetch_from(document_store: Any, *, encoding_key: str = ENCODING_KEY) -> Callable[[Sequence[Document]], list[Any]]:
    """Return a `fetch` for `KalmRanker`: it reads the documents that came without encodings.

    Args:
        document_store: any; Chroma, Qdrant, pgvector and the store in memory are asked by one call for all documents, others
            for each. It need not be the one that was searched.
        encoding_key: that of the ranker.

    Raises:
        SettingsError: it is no document store, or `encoding_key` is one of our other keys.
    """
    if not callable(getattr(document_store, "filter_documents", None)):
        msg = f"document_store must have filter_documents, but got {type(document_store).__name__}; pass a document store"
        raise SettingsError(msg)
    access = _kind_of(document_store)(document_store, None)
    kind = DocumentLayout((), "", check_encoding_key(encoding_key)).kind

    def fetch(documents: Sequence[Document]) -> list[Any]:
        return encodings_of(access, kind, [document.id for document in documents])

    return fetch


def _kind_of(document_store: Any) -> Callable[[Any, Filters | None], DocumentAccess[Document]]:
    # A subclass may do otherwise, and is asked by the methods of every store.
    name = f"{type(document_store).__module__.partition('.')[0]}.{type(document_store).__name__}"
    return _KINDS.get(name, _AnyStore)


class _AnyStore:
    """By `filter_documents` and `update_by_filter`, document by document: a filter by id is all that every store understands.

    There are no pages: to find ids, all documents that match are read at once. What is added goes to documents that still
    have the content that was last read; what is to be taken away becomes null.
    """

    def __init__(self, store: Any, filters: Filters | None) -> None:
        self._store = store
        self._filters = filters
        self._contents: dict[str, str | None] = {}
        self._turn: AbstractContextManager[Any] = nullcontext()

    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        with self._turn:
            return [document.id for document in self._store.filter_documents(self._filters_for(without))]

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Document]:
        # Numbers come from rows that are loaded.
        given = {str(i): i for i in ids}
        with self._turn:
            held = self._find(list(given)) if given else []
        self._contents = {document.id: document.content for document in held}
        return {given[document.id]: document for document in held}

    def add_metadata(self, changes: Changes) -> None:
        with self._turn:
            self._add({str(document_id): added for document_id, added in changes.items()})

    def _filters_for(self, without: Label | None) -> Filters | None:
        if without is None:
            return self._filters
        outdated = {"field": f"meta.{without.key}", "operator": "!=", "value": without.fingerprint}
        # Chroma refuses an AND of one.
        return _all_of(self._filters, outdated) if self._filters else outdated

    def _find(self, ids: Sequence[str]) -> list[Document]:
        return [document for document_id in ids for document in self._store.filter_documents(_same("id", document_id))]

    def _find_unchanged(self, ids: Iterable[str]) -> list[Document]:
        return [document for document in self._find(list(ids)) if document.content == self._contents[document.id]]

    def _add(self, changes: _Changes) -> None:
        for document_id, added in changes.items():
            if self._find_unchanged([document_id]):
                self._store.update_by_filter(_same("id", document_id), dict(added))


class _InMemory(_AnyStore):
    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        # By filters the store copies every document that matches.
        return super().find_ids(without) if self._filters_for(without) else list(self._store.storage)

    def _find(self, ids: Sequence[str]) -> list[Document]:
        found = (self._store.storage.get(document_id) for document_id in ids)
        return [document for document in found if document is not None]

    def _add(self, changes: _Changes) -> None:
        # A copy takes its place: the store hands out the very object that it holds, which is the one that it was given.
        for document in self._find_unchanged(changes):
            changed = replace(document, meta=merged(document.meta, changes[document.id]))
            if self._store.storage.get(document.id) is document:
                self._store.storage[document.id] = changed


class _OneAtATime(_AnyStore):
    """For a store that must not be used by two threads at once: write-back has one thread, backfill works in its caller's."""

    def __init__(self, store: Any, filters: Filters | None) -> None:
        super().__init__(store, filters)
        with _locks_lock:
            self._turn = _locks.setdefault(id(store), threading.Lock())


class _Pgvector(_OneAtATime):
    """In SQL, by the store's one cursor: `filter_documents` has no pages, and `update_by_filter` takes nothing away."""

    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        filters = self._filters_for(without)
        where, values = self._condition(filters)
        query = f"SELECT id FROM {{}} WHERE id > %s{{}} ORDER BY id LIMIT {PAGE_SIZE}"

        def pages() -> Iterator[list[DocumentId]]:
            # By the primary key: no document is skipped while others come, go or change.
            last = ""
            while True:
                with self._turn:
                    page = [row[0] for row in self._cursor().execute(self._sql(query, where), (last, *values)).fetchall()]
                if not page:
                    return
                yield page
                last = page[-1]

        if filters:
            # To count, every document's meta would have to be read once more.
            return PagedIds(pages())
        with self._turn:
            return PagedIds(pages(), self._store.count_documents())

    def _find(self, ids: Sequence[str]) -> list[Document]:
        found: list[Document] = self._store.filter_documents({"field": "id", "operator": "in", "value": list(ids)})
        return found

    def _add(self, changes: _Changes) -> None:
        # The condition and the change are one UPDATE: nothing comes between them.
        statement = self._sql(
            "UPDATE {} SET meta = (COALESCE(meta, '{{}}'::jsonb) - %s::text[]) || %s::jsonb "
            "WHERE id = %s AND content IS NOT DISTINCT FROM %s"
        )
        rows = []
        for document_id, added in changes.items():
            kept, removed = split_change(added)
            rows.append((removed, json.dumps(kept), document_id, self._contents[document_id]))
        self._cursor().executemany(statement, rows)

    def _condition(self, filters: Filters | None) -> tuple[Any, tuple[Any, ...]]:
        if not filters:
            return self._sql(""), ()
        translation = import_module("haystack_integrations.document_stores.pgvector.filters")
        translation._validate_filters(filters)  # noqa: SLF001
        where, values = translation._convert_filters_to_where_clause_and_params(filters, "AND")  # noqa: SLF001
        return where, values

    def _sql(self, text: str, *parts: Any) -> Any:
        sql = import_module("psycopg.sql")
        return sql.SQL(text).format(sql.Identifier(self._store.schema_name, self._store.table_name), *parts)

    def _cursor(self) -> Any:
        self._store._ensure_db_setup()  # noqa: SLF001
        return self._store._cursor  # noqa: SLF001


class _Chroma(_AnyStore):
    """By the collection, which merges what is added: `update_by_filter` writes all metadata that it has read before."""

    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        # All at once, and nothing but ids: pages by offset would skip documents when others delete some, or get a label.
        matching = self._store._prepare_get_kwargs(self._filters_for(without))  # noqa: SLF001
        return list(self._collection().get(**{**matching, "include": []})["ids"])

    def _find(self, ids: Sequence[str]) -> list[Document]:
        found = self._collection().get(ids=list(ids), include=["documents", "metadatas"])
        rows = zip(found["ids"], found["documents"], found["metadatas"], strict=True)
        return [Document(id=document_id, content=text, meta=dict(meta or {})) for document_id, text, meta in rows]

    def _add(self, changes: _Changes) -> None:
        ids = [document.id for document in self._find_unchanged(changes)]
        if ids:
            # It takes a key away whose value is None.
            self._collection().update(ids=ids, metadatas=[dict(changes[document_id]) for document_id in ids])

    def _collection(self) -> Any:
        self._store._ensure_initialized()  # noqa: SLF001
        return self._store._collection  # noqa: SLF001


class _Qdrant(_OneAtATime):
    """By the client, which changes payloads on a condition: `update_by_filter` writes whole points that it has read before.

    Its local mode is not made for threads.
    """

    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        translation = import_module("haystack_integrations.document_stores.qdrant.filters")
        matching, index = translation.convert_filters_to_qdrant(self._filters_for(without)), self._store.index

        def pages() -> Iterator[list[DocumentId]]:
            offset = None
            while True:
                with self._turn:
                    points, offset = self._client().scroll(
                        index, matching, limit=PAGE_SIZE, offset=offset, with_payload=["id"]
                    )
                yield [point.payload["id"] for point in points]
                if offset is None:
                    return

        with self._turn:
            return PagedIds(pages(), self._client().count(index, matching).count)

    def _find(self, ids: Sequence[str]) -> list[Document]:
        found: list[Document] = self._store.get_documents_by_id(list(ids))
        return found

    def _add(self, changes: _Changes) -> None:
        to_point_id = import_module("haystack_integrations.document_stores.qdrant.converters").convert_id
        written = []
        for document_id, added in changes.items():
            content = self._contents[document_id]
            unchanged = None if content is None else ("content", content)
            written.append(qdrant.PayloadChange(to_point_id(document_id), added, unchanged))
        qdrant.add_payloads(self._client(), self._store.index, written, "meta")

    def _client(self) -> Any:
        self._store._initialize_client()  # noqa: SLF001
        return self._store._client  # noqa: SLF001


def _same(field: str, value: object) -> Filters:
    return {"field": field, "operator": "==", "value": value}


def _all_of(*conditions: Filters) -> Filters:
    return {"operator": "AND", "conditions": list(conditions)}


# By name, so that no store's package is imported.
_KINDS: dict[str, Callable[[Any, Filters | None], DocumentAccess[Document]]] = {
    "haystack.InMemoryDocumentStore": _InMemory,
    "haystack_integrations.ChromaDocumentStore": _Chroma,
    "haystack_integrations.PgvectorDocumentStore": _Pgvector,
    "haystack_integrations.QdrantDocumentStore": _Qdrant,
}
