"""LanceDB, as langchain-community stores documents in it: metadata is one struct, whose fields the first documents make."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from langchain_core.documents import Document

from kalm_integrations.hosting.stores import PAGE_SIZE, Changes, DocumentId, Label, PagedIds
from kalm_integrations.langchain.store_kinds.base import StoreAccess

_METADATA = "metadata"
_READ_BATCH = 100


class LanceDBAccess(StoreAccess):
    """By the table, opened anew for each call: one that is open does not see what others write.

    Encodings lie in the struct if it has their fields, and otherwise in two columns beside it, which searches do not carry: a
    search that filters by metadata fails when the struct gets fields later.
    """

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
        columns = {"id": f"`{self._id}`"}
        if without is None:
            batches = table.search().select(columns).to_batches(PAGE_SIZE)
            return PagedIds((batch.column("id").to_pylist() for batch in batches), table.count_rows())
        if without.key in _fields(table):
            return PagedIds(self._unlabelled(table.search().select(columns | {_METADATA: _METADATA}), without))
        search = table.search().select(columns)
        if without.key in table.schema.names:
            search = search.where(f"`{without.key}` is null or `{without.key}` != {_literal(without.fingerprint)}")
        return PagedIds(batch.column("id").to_pylist() for batch in search.to_batches(PAGE_SIZE))

    def _unlabelled(self, search: Any, without: Label) -> Iterator[list[DocumentId]]:
        # By whole structs: to pick one field fails where rows were added that lack some.
        for batch in search.to_batches(_READ_BATCH):
            yield [row["id"] for row in batch.to_pylist() if not without.is_on(row[_METADATA] or {})]

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Document]:
        """Return documents by id."""
        if (table := self._table) is None or not ids:
            return {}
        columns = {"id": f"`{self._id}`", "text": f"`{self._store._text_key}`", _METADATA: _METADATA}  # noqa: SLF001
        beside = {key: f"`{key}`" for key in self._keys if key in table.schema.names}
        rows = table.search().where(self._is_one_of(ids)).select(columns | beside).to_list()
        return {
            row["id"]: Document(
                row["text"],
                id=row["id"],
                metadata=(row[_METADATA] or {}) | {key: row[key] for key in beside if row[key] is not None},
            )
            for row in rows
            if row["text"] is not None
        }

    def id_of(self, document: Document) -> DocumentId | None:
        """Return what the metadata has under the name of the ids' column: documents are found without their ids."""
        found: DocumentId | None = document.id or document.metadata.get(self._id)
        return found

    def add_metadata(self, changes: Changes) -> None:
        """Set fields or columns of each row as it is now, of all rows in one new version of the table."""
        table = self._table
        keys = dict.fromkeys(key for change in changes.values() for key in change)
        places = {key: _place(table, key) for key in keys}
        if missing := [key for key, place in places.items() if place is None]:
            table.add_columns(dict.fromkeys(missing, "cast(null as string)"))
        chosen = {
            key: self._chosen(place or f"`{key}`", {i: change[key] for i, change in changes.items() if key in change})
            for key, place in places.items()
        }
        held = _fields(table)
        # Wrapped, because a case is taken within a function only.
        values = {key: f"named_struct('value', {value})['value']" for key, value in chosen.items() if key not in held}
        if len(values) < len(chosen):
            struct = ", ".join(f"{_literal(key)}, {chosen.get(key, _field(key))}" for key in held)
            values[_METADATA] = f"named_struct({struct})"
        table.update(where=self._is_one_of(list(changes)), values_sql=values)

    def _chosen(self, place: str, values: Mapping[DocumentId, str | None]) -> str:
        """Return the SQL of what has a value by id, and is left as it is in other rows."""
        cases = " ".join(
            f"when {_literal(i)} then {'null' if value is None else _literal(value)}" for i, value in values.items()
        )
        return f"case `{self._id}` {cases} else {place} end"

    def _is_one_of(self, ids: Sequence[DocumentId]) -> str:
        return f"`{self._id}` in ({', '.join(map(_literal, ids))})"


def _place(table: Any, key: str) -> str | None:
    """Return the SQL of where a key's values lie; None if they have no place yet."""
    if key in _fields(table):
        return _field(key)
    return f"`{key}`" if key in table.schema.names else None


def _fields(table: Any) -> list[str]:
    return [field.name for field in table.schema.field(_METADATA).type]


def _field(key: str) -> str:
    return f"{_METADATA}[{_literal(key)}]"


def _literal(value: object) -> str:
    return "'" + str(value).replace("'", "''") + "'"
