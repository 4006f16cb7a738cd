"""Qdrant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from langchain_core.documents import Document

from kalm_integrations.hosting import qdrant
from kalm_integrations.hosting.stores import Changes, DocumentId, Label
from kalm_integrations.langchain.store_kinds.base import StoreAccess


class QdrantAccess(StoreAccess):
    """By the client."""

    has_text_ids = False

    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        """Return ids, page by page."""
        return qdrant.find_ids(self._store.client, self._store.collection_name, self._store.metadata_payload_key, without)

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Document]:
        """Return documents by id."""
        points = self._store.client.retrieve(self._store.collection_name, list(ids))
        text_key, metadata_key = self._store.content_payload_key, self._store.metadata_payload_key
        return {
            point.id: Document(point.payload[text_key], id=str(point.id), metadata=point.payload.get(metadata_key) or {})
            for point in points
            if point.payload.get(text_key) is not None
        }

    def id_of(self, document: Document) -> DocumentId | None:
        """Return the point's id: the store leaves `Document.id` empty and writes it into the metadata."""
        found: DocumentId | None = document.metadata.get("_id", document.id)
        return found

    def add_metadata(self, changes: Changes) -> None:
        """Add to payloads."""
        written = [qdrant.PayloadChange(document_id, added) for document_id, added in changes.items()]
        qdrant.add_payloads(self._store.client, self._store.collection_name, written, self._store.metadata_payload_key)
