"""Rows of JSON lines, Parquet and `datasets`' folders as blocks of Ray Data, checked before anything is encoded."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from ray.data.datasource import FileBasedDatasource

from kalm_integrations.bulk.arrow import RowSchema, infer_schema, to_table
from kalm_integrations.bulk.ray.folders import JSONL_EXTENSIONS, Source
from kalm_integrations.core.types import shown
from kalm_integrations.corpora.jsonl import PassageFields, Row, parse_lines, parse_object
from kalm_integrations.corpora.text import read_lines
from kalm_integrations.errors import SettingsError

ROWS_PER_BLOCK = 1024
"""Of JSON lines, as they are read."""


class _JsonLines(FileBasedDatasource):
    """JSON lines as every command reads them: bad lines are named, and no string becomes a time, as Arrow's reader has it."""

    def __init__(self, paths: list[str], fields: PassageFields, id_field: str, schema: pa.Schema | None) -> None:
        super().__init__(paths, file_extensions=JSONL_EXTENSIONS)
        self._fields, self._id_field, self._columns = fields, id_field, schema

    def _read_stream(self, f: Any, path: str) -> Iterator[pa.Table]:
        def parse(line: str) -> Row:
            row = parse_object(line)
            check_row(row, self._fields, self._id_field)
            return row

        numbered = parse_lines(read_lines(io.BufferedReader(f), path), path, parse)
        while block := list(islice(numbered, ROWS_PER_BLOCK)):
            rows = [row for _, row in block]
            yield to_table(rows, infer_schema(rows) if self._columns is None else self._columns)


class _ArrowStreams(FileBasedDatasource):
    """The files of a folder that `datasets` has saved."""

    def _read_stream(self, f: Any, path: str) -> Iterator[pa.Table]:  # noqa: ARG002
        with pa.ipc.open_stream(f) as reader:
            for batch in reader:
                yield pa.Table.from_batches([batch])


def read_rows(source: Source, fields: PassageFields, id_field: str, schema: pa.Schema | None) -> ray.data.Dataset:
    """Return the rows of a source; of JSON lines the columns are those of `schema`, or each block's own."""
    if source.kind == "parquet":
        rows: ray.data.Dataset = ray.data.read_parquet(source.files, file_extensions=["parquet"])
    elif source.kind == "datasets":
        rows = ray.data.read_datasource(_ArrowStreams(source.files))
    else:
        rows = ray.data.read_datasource(_JsonLines(source.files, fields, id_field, schema))
    return rows


def check_rows(source: Source, fields: PassageFields, id_field: str) -> tuple[int, pa.Schema]:
    """Read a source to its end before anything is encoded; return how many rows there are, and all their columns.

    Raises:
        SettingsError: a row is bad; two have one id, and Ray's checkpoints would lose one of them; or columns differ in type.
    """

    def check(table: pa.Table) -> pa.Table:
        for row in select(table, needed_columns(fields, id_field)):
            check_row(row, fields, id_field)
        schemas = [table.schema.serialize().to_pybytes(), *[None] * (len(table) - 1)][: len(table)]
        ids = table[id_field] if len(table) else pa.array([], pa.string())
        return pa.table({"id": ids, "schema": pa.array(schemas, pa.binary())})

    ids: list[pa.Array] = []
    seen: set[bytes] = set()
    schema = RowSchema()
    checked = read_rows(source, fields, id_field, None).map_batches(check, batch_format="pyarrow", batch_size=None)
    for batch in checked.iter_batches(batch_format="pyarrow", batch_size=None):
        table = cast("pa.Table", batch)
        ids.extend(table["id"].chunks)
        for one in set(table["schema"].drop_null().to_pylist()) - seen:
            schema.add_schema(pa.ipc.read_schema(pa.py_buffer(one)))
            seen.add(one)
    n_rows = sum(map(len, ids))
    values = pc.value_counts(pa.chunked_array(ids, None if ids else pa.string()))
    repeated = values.filter(pc.greater(values.field("counts"), 1))
    if len(repeated):
        first = repeated[0].as_py()
        msg = (
            f"every row must have an id of its own under {id_field!r}, but {first['counts']} rows have "
            f"{shown(first['values'])} there, and {len(repeated) - 1:,} other ids are not unique either; name another field"
        )
        raise SettingsError(msg)
    return n_rows, schema.finished()


def needed_columns(fields: PassageFields, id_field: str) -> tuple[str, ...]:
    """Return the fields that make a row's id and passage."""
    return tuple(dict.fromkeys(name for name in (id_field, fields.text, fields.title) if name is not None))


def select(table: pa.Table, names: Sequence[str]) -> list[Row]:
    """Return rows with some of their fields, where they have them."""
    rows: list[Row] = table.select([name for name in names if name in table.column_names]).to_pylist()
    return rows


def check_row(row: Row, fields: PassageFields, id_field: str) -> None:
    """Check what a row must have.

    Raises:
        SettingsError: it has no id, or no passage.
    """
    value = row.get(id_field)
    if type(value) not in (str, int):
        has = f"has {shown(value)} there" if value is not None else f"has the keys: {', '.join(map(repr, row)) or 'none'}"
        msg = f"a row must have an id under {id_field!r}, a string or a whole number, but {has}"
        raise SettingsError(msg)
    try:
        fields.read(row)
    except SettingsError as error:
        msg = f"{name_of(row, id_field)}: {error}"
        raise SettingsError(msg) from error


def name_of(row: Row, id_field: str) -> str:
    """Return what messages call a row."""
    return f"row {shown(row[id_field])}"
