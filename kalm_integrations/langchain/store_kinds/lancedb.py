"""LanceDB, as langchain-community stores documents in it: metadata is one struct, whose fields are those of the table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

from langchain_core.documents import Document

from kalm_integrations.hosting.stores import PAGE_SIZE, Changes, DocumentId, Label, PagedIds
from kalm_integrations.langchain.store_kinds.base import StoreAccess

_METADATA = "metadata"


class LanceDBAccess(StoreAccess):
    """By the table, opened anew for each call: one that is open does not see what others write."""

    @property
    def _table(self) -> Any:
        """None before the first document."""
        return self._store.get_table()

    @property
    def _id(self) -> str:
        key: str = self._store._id_key  # noqa: SLF001
        return key

    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        """Return ids of the table as it is now, in batches."""
        if (table := self._table) is None:
            return []
        outdated = None
        if without is not None and without.key in _fields(table):
            label = _field(without.key)
            outdated = f"{label} is null or {label} != {_literal(without.fingerprint)}"
        search = table.search().select({"id": f"`{self._id}`"})
        batches = (search if outdated is None else search.where(outdated)).to_batches(PAGE_SIZE)
        return PagedIds((batch.column("id").to_pylist() for batch in batches), table.count_rows(outdated))

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Document]:
        """Return documents by id."""
        if (table := self._table) is None or not ids:
            return {}
        columns = {"id": f"`{self._id}`", "text": f"`{self._store._text_key}`", _METADATA: _METADATA}  # noqa: SLF001
        rows = table.search().where(self._is_one_of(ids)).select(columns).to_list()
        return {
            row["id"]: Document(row["text"], id=row["id"], metadata=row[_METADATA] or {})
            for row in rows
            if row["text"] is not None
        }

    def id_of(self, document: Document) -> DocumentId | None:
        """Return what the metadata has under the name of the ids' column: documents are found without their ids."""
        found: DocumentId | None = document.id or document.metadata.get(self._id)
        return found

    def add_metadata(self, changes: Changes) -> None:
        """Set fields of the struct of each row as it is now, all rows in one new version of the table."""
        table = self._table
        keys = dict.fromkeys(key for change in changes.values() for key in change)
        held = _fields(table)
        if missing := [key for key in keys if key not in held]:
            arrow = import_module("pyarrow")
            struct = arrow.struct([arrow.field(key, arrow.string()) for key in missing])
            table.add_columns(arrow.schema([arrow.field(_METADATA, struct)]))
        values = {
            key: self._chosen(key, {i: change[key] for i, change in changes.items() if key in change})
            if key in keys
            else _field(key)
            for key in [*held, *missing]
        }
        struct = ", ".join(f"{_literal(key)}, {value}" for key, value in values.items())
        table.update(where=self._is_one_of(list(changes)), values_sql={_METADATA: f"named_struct({struct})"})

    def _chosen(self, key: str, values: Mapping[DocumentId, str | None]) -> str:
        """Return the SQL of a field that has a value by id, and is left as it is in other rows."""
        cases = " ".join(
            f"when {_literal(i)} then {'null' if value is None else _literal(value)}" for i, value in values.items()
        )
        return f"case `{self._id}` {cases} else {_field(key)} end"

    def _is_one_of(self, ids: Sequence[DocumentId]) -> str:
        return f"`{self._id}` in ({', '.join(map(_literal, ids))})"


def _fields(table: Any) -> list[str]:
    return [field.name for field in table.schema.field(_METADATA).type]


def _field(key: str) -> str:
    return f"{_METADATA}[{_literal(key)}]"


def _literal(value: object) -> str:
    return "'" + str(value).replace("'", "''") + "'"
