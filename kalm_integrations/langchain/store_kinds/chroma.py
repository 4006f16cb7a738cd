"""Chroma."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from langchain_core.documents import Document

from kalm_integrations.hosting.stores import PAGE_SIZE, Changes, DocumentId, Label, PagedIds
from kalm_integrations.langchain.store_kinds.base import StoreAccess


class ChromaAccess(StoreAccess):
    """By the collection's own calls where `Chroma` would embed again."""

    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        """Return ids, page by page."""
        where = None if without is None else {without.key: {"$ne": without.fingerprint}}
        n_rows = self._store._collection.count()  # noqa: SLF001
        return PagedIds(self._pages(n_rows, where), n_rows if where is None else None)

    def _pages(self, n_rows: int, where: dict[str, Any] | None) -> Iterator[list[DocumentId]]:
        # Over all rows, because a row that gets its label leaves a filtered list, and the next ones move up by one. From the
        # end, because what others delete moves rows up too: there they are still to come, and some come again.
        before: set[DocumentId] = set()
        for end in range(n_rows, 0, -PAGE_SIZE):
            start = max(0, end - PAGE_SIZE)
            ids = self._store.get(limit=end - start, offset=start, include=[])["ids"]
            wanted = self._store.get(ids=ids, where=where, include=[])["ids"] if where and ids else ids
            yield [i for i in wanted if i not in before]
            before = set(ids)

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Document]:
        """Return documents by id."""
        found = self._store.get(ids=list(ids), include=["documents", "metadatas"])
        rows = zip(found["ids"], found["documents"], found["metadatas"], strict=True)
        return {i: Document(text, id=i, metadata=metadata or {}) for i, text, metadata in rows if text is not None}

    def add_metadata(self, changes: Changes) -> None:
        """Merge: Chroma takes a key away whose value is None."""
        self._store._collection.update(ids=list(changes), metadatas=[dict(c) for c in changes.values()])  # noqa: SLF001
