"""What all kinds of stores have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from langchain_core.documents import Document

from kalm_integrations.hosting.documents import fingerprint_key
from kalm_integrations.hosting.stores import Changes, DocumentId, Label


class StoreAccess(ABC):
    """A `DocumentAccess`."""

    has_text_ids = True
    """Ids are strings, also where rows that are loaded have numbers."""

    def __init__(self, store: Any, encoding_key: str) -> None:
        """Take a store and the metadata key of the encoding.

        Raises:
            SettingsError: encodings cannot be written under that key into this store.
        """
        self._store = store
        self._keys = (encoding_key, fingerprint_key(encoding_key))

    @abstractmethod
    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        """See `DocumentAccess`."""

    @abstractmethod
    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Document]:
        """See `DocumentAccess`."""

    @abstractmethod
    def add_metadata(self, changes: Changes) -> None:
        """See `DocumentAccess`."""

    def id_of(self, document: Document) -> DocumentId | None:
        """See `DocumentAccess`."""
        return document.id
