"""Milvus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from langchain_core.documents import Document

from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting.stores import PAGE_SIZE, Changes, DocumentId, Label, PagedIds
from kalm_integrations.langchain.store_kinds.base import StoreAccess


class MilvusAccess(StoreAccess):
    """By the client's partial upserts, which leave vectors, texts and other metadata alone."""

    def __init__(self, store: Any, encoding_key: str) -> None:
        """Take a store.

        Raises:
            SettingsError: it gives out ids itself, keeps all metadata in one field, or has no place for encodings.
        """
        super().__init__(store, encoding_key)
        refused = {
            "auto_id=True": (store.auto_id, "Milvus gives a row another id when it is written; give ids of your own"),
            "metadata_field": (store._metadata_field, "Milvus replaces that as a whole; use enable_dynamic_field=True"),  # noqa: SLF001
        }
        for setting, (is_set, why) in refused.items():
            if is_set:
                msg = f"Milvus must be open without {setting} to be written to, but it is set; {why}"
                raise SettingsError(msg)
        self._client = store.client
        self._name = store.collection_name
        self._id = store._primary_field  # noqa: SLF001
        schema = self._schema
        names = [field["name"] for field in schema.get("fields", [])]
        missing = [key for key in self._keys if key not in names]
        if schema and missing and not schema["enable_dynamic_field"]:
            msg = (
                f"a Milvus collection must have fields of the names {', '.join(self._keys)} or dynamic ones, but "
                f"{self._name} has no {' and no '.join(missing)}; create it from encoded documents or with "
                "enable_dynamic_field=True, or add fields of 65,535 characters"
            )
            raise SettingsError(msg)

    @property
    def _schema(self) -> dict[str, Any]:
        """Empty before the first document."""
        schema: dict[str, Any] = {}
        if self._client.has_collection(self._name):
            schema = self._client.describe_collection(self._name)
        return schema

    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        """Return ids, page by page in their order."""
        if not self._schema:
            return []
        outdated = "" if without is None else f'{without.key} is null or {without.key} != "{without.fingerprint}"'
        counted = self._client.query(self._name, filter=outdated, output_fields=["count(*)"], consistency_level="Strong")
        return PagedIds(self._pages(outdated), counted[0]["count(*)"])

    def _pages(self, outdated: str) -> Iterator[list[DocumentId]]:
        iterator = self._client.query_iterator(
            self._name, batch_size=PAGE_SIZE, filter=outdated, output_fields=[self._id], consistency_level="Strong"
        )
        try:
            while rows := iterator.next():
                yield [row[self._id] for row in rows]
        finally:
            iterator.close()

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Document]:
        """Return documents by id."""
        if not self._schema:
            return {}
        # The fields that a search brings, and dynamic ones that this store object does not know yet.
        fields = [*self._store._get_output_fields(), *self._keys]  # noqa: SLF001
        held = {}
        for row in self._get(ids, list(dict.fromkeys(fields))):
            text = row.pop(self._store._text_field)  # noqa: SLF001
            metadata = {key: value for key, value in row.items() if value or key not in self._keys}
            held[row[self._id]] = Document(text, id=row[self._id], metadata=metadata)
        return held

    def id_of(self, document: Document) -> DocumentId | None:
        """Return what the metadata has under the name of the ids' field."""
        found: DocumentId | None = document.metadata.get(self._id, document.id)
        return found

    def add_metadata(self, changes: Changes) -> None:
        """Write fields of rows that are there: Milvus refuses a batch of which one is gone."""
        # A static field need not take null.
        no_value = None if self._schema["enable_dynamic_field"] else ""
        held = {row[self._id] for row in self._get(list(changes), [self._id])}
        rows = [
            {self._id: i, **{key: no_value if value is None else value for key, value in change.items()}}
            for i, change in changes.items()
            if i in held
        ]
        self._client.upsert(self._name, rows, partial_update=True)

    def _get(self, ids: Sequence[DocumentId], fields: Sequence[str]) -> list[dict[str, Any]]:
        if not ids:
            return []
        rows: list[dict[str, Any]] = self._client.query(
            self._name, ids=list(ids), output_fields=list(fields), consistency_level="Strong"
        )
        return rows
