"""Stores that keep whole documents, in memory or by key: each document is read anew at the moment when it is written."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from langchain_core.documents import Document

from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting.stores import Changes, DocumentId, Label, PagedIds, merged
from kalm_integrations.langchain.documents import with_metadata
from kalm_integrations.langchain.store_kinds.base import StoreAccess

_READ_BATCH = 100


class _Replacing(StoreAccess):
    @abstractmethod
    def _all_ids(self) -> Iterable[DocumentId]: ...

    @abstractmethod
    def _add(self, document_id: DocumentId, added: Mapping[str, str | None]) -> None: ...

    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        """Return the ids that there are now; documents are read later, batch by batch."""
        # A copy, because others may add documents meanwhile, and once each: Redis scans may repeat themselves.
        ids = list(dict.fromkeys(self._all_ids()))
        return ids if without is None else PagedIds(self._pages(ids, without))

    def _pages(self, ids: list[DocumentId], without: Label) -> Iterator[list[DocumentId]]:
        for start in range(0, len(ids), _READ_BATCH):
            batch = self.read(ids[start : start + _READ_BATCH])
            yield [i for i, document in batch.items() if not without.is_on(document.metadata)]

    def add_metadata(self, changes: Changes) -> None:
        """Write one document after the other."""
        for document_id, added in changes.items():
            self._add(document_id, added)


class InMemoryAccess(_Replacing):
    """InMemoryVectorStore."""

    @property
    def _entries(self) -> dict[DocumentId, Any]:
        entries: dict[DocumentId, Any] = self._store.store
        return entries

    def _all_ids(self) -> Iterable[DocumentId]:
        return self._entries

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Document]:
        """Return documents by id."""
        held = {i: self._entries[i] for i in ids if i in self._entries}
        return {i: Document(entry["text"], id=entry["id"], metadata=entry["metadata"]) for i, entry in held.items()}

    def _add(self, document_id: DocumentId, added: Mapping[str, str | None]) -> None:
        # The entry that is there is changed: one that replaces it meanwhile stays. Its old metadata a query may still hold.
        if entry := self._entries.get(document_id):
            entry["metadata"] = merged(entry["metadata"], added)


class FaissAccess(_Replacing):
    """FAISS, in its docstore: `add` refuses ids that are there, and `delete` before it would let a query find nothing."""

    def __init__(self, store: Any, encoding_key: str) -> None:
        """Take a store.

        Raises:
            SettingsError: its docstore is not in memory.
        """
        super().__init__(store, encoding_key)
        if not isinstance(getattr(store.docstore, "_dict", None), dict):
            msg = f"the docstore of FAISS must be an InMemoryDocstore, but got {type(store.docstore).__name__}"
            raise SettingsError(msg)

    @property
    def _held(self) -> dict[DocumentId, Document]:
        # A new one with every addition.
        held: dict[DocumentId, Document] = self._store.docstore._dict  # noqa: SLF001
        return held

    def _all_ids(self) -> Iterable[DocumentId]:
        return self._held

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Document]:
        """Return documents by id."""
        return {i: self._held[i] for i in ids if i in self._held}

    def _add(self, document_id: DocumentId, added: Mapping[str, str | None]) -> None:
        # A copy takes its place: queries are given the very object that is stored.
        if document := self._held.get(document_id):
            self._held[document_id] = with_metadata(document, merged(document.metadata, added))


class KeyValueAccess(_Replacing):
    """A key-value docstore."""

    def _all_ids(self) -> Iterable[DocumentId]:
        keys: Iterable[DocumentId] = self._store.yield_keys()
        return keys

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Document]:
        """Return documents by key.

        Raises:
            SettingsError: the store holds something else than documents.
        """
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
