"""PostgreSQL, in SQL: the stores' own `add_documents(ids=...)` replaces all metadata and embeds again."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from typing import Any
from uuid import UUID

from langchain_core.documents import Document

from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting.stores import PAGE_SIZE, Changes, DocumentId, Label, PagedIds, split_change
from kalm_integrations.langchain.store_kinds.base import StoreAccess

_MERGED = "(coalesce(cast({0} as jsonb), '{{}}') || cast(:added as jsonb)) - cast(:removed as text[])"
"""A JSON column of a row as it is now, with what is added and without what is taken away."""


class PGVectorAccess(StoreAccess):
    """PGVector, whose collections lie in one table."""

    def __init__(self, store: Any, encoding_key: str) -> None:
        """Take a store.

        Raises:
            SettingsError: it is in async mode.
        """
        super().__init__(store, encoding_key)
        if store.async_mode:
            msg = "PGVector must be in sync mode to be written to, but got async_mode=True; open it again without"
            raise SettingsError(msg)
        self._text: Any = import_module("sqlalchemy").text
        self._table = store.EmbeddingStore.__tablename__

    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        """Return ids, page by page and each in a transaction of its own."""
        # What lacks a label is not counted: that would read all metadata.
        count = f"select count(*) as n from {self._table} where collection_id = :collection"
        return PagedIds(self._pages(without), self._select(count, {})[0].n if without is None else None)

    def _pages(self, without: Label | None) -> Iterator[list[DocumentId]]:
        values = {} if without is None else asdict(without)
        outdated = "" if without is None else "and cmetadata ->> :key is distinct from :fingerprint"
        after = ""
        while True:
            query = (
                f"select id from {self._table} where collection_id = :collection {outdated} {after} order by id limit :size"
            )
            ids = [row.id for row in self._select(query, {**values, "size": PAGE_SIZE})]
            if not ids:
                return
            yield ids
            after, values["last"] = "and id > :last", ids[-1]

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Document]:
        """Return documents by id."""
        query = (
            f"select id, document, cmetadata from {self._table} "
            "where collection_id = :collection and id = any(:ids) and document is not null"
        )
        rows = self._select(query, {"ids": list(ids)})
        return {row.id: Document(row.document, id=row.id, metadata=row.cmetadata or {}) for row in rows}

    def add_metadata(self, changes: Changes) -> None:
        """Merge into `cmetadata`, in one transaction."""
        merged = _MERGED.format("cmetadata")
        statement = self._text(f"update {self._table} set cmetadata = {merged} where collection_id = :collection and id = :id")
        with self._store._make_sync_session() as session:  # noqa: SLF001
            collection = self._store.get_collection(session).uuid
            rows = [{"id": i, "collection": collection, **_json_change(change)} for i, change in changes.items()]
            session.execute(statement, rows)
            session.commit()

    def _select(self, query: str, values: Mapping[str, Any]) -> list[Any]:
        with self._store._make_sync_session() as session:  # noqa: SLF001
            collection = self._store.get_collection(session).uuid
            return list(session.execute(self._text(query), {**values, "collection": collection}))


class PGVectorStoreAccess(StoreAccess):
    """PGVectorStore: a table of its own, with encodings in columns if it has some of their names, or in its JSON column.

    Columns count that the table has, also those that the store object ignores so that its searches are lean.
    """

    def __init__(self, store: Any, encoding_key: str) -> None:
        """Take a store.

        Raises:
            SettingsError: its engine has no loop, or the table has no place for encodings.
        """
        super().__init__(store, encoding_key)
        self._engine = store._engine  # noqa: SLF001
        if self._engine._loop is None:  # noqa: SLF001
            msg = (
                "PGVectorStore must have an engine that can be called synchronously, but got one without a loop; open it by "
                "PGEngine.from_connection_string(...), or PGEngine.from_engine(engine, loop=...) with a loop of another thread"
            )
            raise SettingsError(msg)
        self._text: Any = import_module("sqlalchemy").text
        # The names of its table and columns.
        names = store._PGVectorStore__vs  # noqa: SLF001
        self._table = f"{_quoted(names.schema_name)}.{_quoted(names.table_name)}"
        self._id, self._content = _quoted(names.id_column), _quoted(names.content_column)
        query = (
            "select column_name, udt_name from information_schema.columns where table_schema = :schema and table_name = :table"
        )
        rows = self._run([(query, {"schema": names.schema_name, "table": names.table_name})])
        types = {row.column_name: row.udt_name for row in rows}
        self._id_type = types[names.id_column]
        self._json = names.metadata_json_column and _quoted(names.metadata_json_column)
        self._columns = [key for key in self._keys if key in types]
        read = dict.fromkeys([*names.metadata_columns, *self._columns])
        self._read_columns = [name for name in read if name != names.metadata_json_column]
        missing = [key for key in self._keys if key not in types]
        if missing and self._json is None:
            added = ", ".join(f"add column {_quoted(key)} text" for key in missing)
            msg = (
                f"the table of a PGVectorStore must have a JSON column or columns of the names {', '.join(self._keys)}, "
                f"but {names.table_name} has no {' and no '.join(missing)}; alter table {self._table} {added}"
            )
            raise SettingsError(msg)

    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        """Return ids, page by page and each in a transaction of its own."""
        count = f"select count(*) as n from {self._table}"
        return PagedIds(self._pages(without), self._run([(count, {})])[0].n if without is None else None)

    def _pages(self, without: Label | None) -> Iterator[list[DocumentId]]:
        values: dict[str, Any] = {"size": PAGE_SIZE}
        outdated = "true"
        if without is not None:
            values |= asdict(without)
            in_column = without.key in self._columns
            label = _quoted(without.key) if in_column else f"{self._json} ->> cast(:key as text)"
            outdated = f"{label} is distinct from cast(:fingerprint as text)"
            if in_column:
                del values["key"]
        after = ""
        while True:
            query = (
                f"select cast({self._id} as text) as id from {self._table} where {outdated} {after} "
                f"order by {self._table}.{self._id} limit :size"
            )
            ids = [row.id for row in self._run([(query, values)])]
            if not ids:
                return
            yield ids
            after, values["last"] = f"and {self._id} > {self._cast(':last')}", ids[-1]

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Document]:
        """Return documents by id."""
        given = {canonical: i for i in ids if (canonical := self._canonical(i)) is not None}
        names = [f"{_quoted(name)} as c{n}" for n, name in enumerate(self._read_columns)]
        # As text, because drivers differ in whether they parse JSON.
        stored = "null" if self._json is None else f"cast({self._json} as text)"
        columns = ", ".join([f"cast({self._id} as text) as id", f"{self._content} as content", f"{stored} as json", *names])
        query = f"select {columns} from {self._table} where {self._id} = any({self._cast(':ids', '[]')})"
        held = {}
        for row in self._run([(query, {"ids": list(given)})]):
            found = {name: getattr(row, f"c{n}") for n, name in enumerate(self._read_columns)}
            metadata = json.loads(row.json or "{}") | {key: value for key, value in found.items() if value is not None}
            held[given[row.id]] = Document(row.content, id=row.id, metadata=metadata)
        return held

    def add_metadata(self, changes: Changes) -> None:
        """Set columns and merge into the JSON column, in one transaction."""
        # One statement for all that change the same keys, as all of a batch do.
        rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for i, change in changes.items():
            in_columns = [key for key in change if key in self._columns]
            sets = [f"{_quoted(key)} = :c{n}" for n, key in enumerate(in_columns)]
            values = {"id": str(i), **{f"c{n}": change[key] for n, key in enumerate(in_columns)}}
            if in_json := {key: value for key, value in change.items() if key not in in_columns}:
                sets.append(f"{self._json} = cast({_MERGED.format(self._json)} as json)")
                values |= _json_change(in_json)
            where = f"{self._id} = {self._cast(':id')}"
            rows[f"update {self._table} set {', '.join(sets)} where {where}"].append(values)
        self._run(list(rows.items()))

    def _canonical(self, document_id: DocumentId) -> str | None:
        """Return how the table's ids are written; None for what cannot be one."""
        try:
            if self._id_type == "uuid":
                return str(UUID(str(document_id)))
            return str(int(document_id)) if self._id_type.startswith("int") else str(document_id)
        except ValueError:
            return None

    def _cast(self, parameter: str, suffix: str = "") -> str:
        # By way of text, which every driver takes.
        return f"cast(cast({parameter} as text{suffix}) as {self._id_type}{suffix})"

    def _run(self, statements: Sequence[tuple[str, Any]]) -> list[Any]:
        """Run statements in one transaction and return the rows of the last one."""

        async def run() -> list[Any]:
            rows: list[Any] = []
            async with self._engine._pool.begin() as connection:  # noqa: SLF001
                for statement, values in statements:
                    result = await connection.execute(self._text(statement), values)
                    rows = list(result) if result.returns_rows else []
            return rows

        rows: list[Any] = self._engine._run_as_sync(run())  # noqa: SLF001
        return rows


def _json_change(change: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the parameters of `_MERGED`."""
    added, removed = split_change(change)
    return {"added": json.dumps(added), "removed": removed}


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
