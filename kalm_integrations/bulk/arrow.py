"""Arrow and Hugging Face datasets, imported when they are needed: schemas of rows, and tables that keep their values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY, Metadata
from kalm_integrations.corpora.jsonl import Row
from kalm_integrations.errors import MissingExtraError, SettingsError

if TYPE_CHECKING:
    import pyarrow as pa

INSTALL = "pip install 'kalm-integrations[bulk]'"
_HUGGING_FACE = b"huggingface"
"""Key of a schema's metadata under which datasets keep their features."""


def import_pyarrow() -> Any:
    """Return pyarrow.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        msg = f"Parquet needs pyarrow, which is not installed; {INSTALL}"
        raise MissingExtraError(msg) from error
    return pa


def import_datasets() -> Any:
    """Return the datasets library.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        msg = f"a folder of a Hugging Face dataset needs datasets, which is not installed; {INSTALL}"
        raise MissingExtraError(msg) from error
    return datasets


class RowSchema:
    """The Arrow schema of rows of JSON, found from the rows."""

    def __init__(self) -> None:
        """Begin without fields."""
        self._schema: pa.Schema = import_pyarrow().schema([])

    def add(self, rows: Sequence[Row]) -> None:
        """Widen the schema by rows.

        Raises:
            SettingsError: a field's values have no one type; the message names the field.
        """
        self.add_schema(infer_schema(rows))

    def add_schema(self, schema: pa.Schema) -> None:
        """Widen the schema by one that was found from other rows; see `add`."""
        self._schema = _merged(self._schema, schema)

    def finished(self) -> pa.Schema:
        """Return the schema; fields that are null in all rows are strings.

        Raises:
            SettingsError: a field has only empty objects, which Parquet lacks.
        """
        pa = import_pyarrow()
        return pa.schema([field.with_type(_without_nulls(field.type, field.name)) for field in self._schema])


def infer_schema(rows: Sequence[Row]) -> pa.Schema:
    """Return the Arrow schema of some rows.

    Raises:
        SettingsError: a field's values have no one type.
    """
    pa = import_pyarrow()
    names = dict.fromkeys(name for row in rows for name in row)
    fields = []
    for name in names:
        try:
            fields.append(pa.field(name, pa.array([row.get(name) for row in rows]).type))
        except (pa.ArrowException, OverflowError, UnicodeError, ValueError, TypeError) as error:
            raise _no_type(name, str(error)) from error
    return pa.schema(fields)


def to_table(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    """Return rows as a table of a schema that holds all that they have.

    Raises:
        SettingsError: a row has a field, or a value, for which the schema has no place; nothing is dropped.
    """
    pa = import_pyarrow()
    found = infer_schema(rows)
    for field in found:
        # Arrow drops what it has no place for, also deep inside.
        place = schema.field(field.name) if field.name in schema.names else None
        if place is None or _merged(pa.schema([place]), pa.schema([field])) != pa.schema([place]):
            what = "is new" if place is None else f"is {field.type} instead of {place.type}"
            raise _no_type(field.name, f"it {what} after the rows that were written")
    columns = []
    for field in schema:
        try:
            columns.append(pa.array([row.get(field.name) for row in rows], field.type))
        except (pa.ArrowException, OverflowError, UnicodeError, ValueError, TypeError) as error:
            raise _no_type(field.name, str(error)) from error
    return pa.Table.from_arrays(columns, schema=schema)


def output_schema(schema: pa.Schema) -> pa.Schema:
    """Return a schema with the columns of encodings at its end, instead of those that it may have."""
    pa = import_pyarrow()
    kept = [field for field in schema if field.name not in (ENCODING_KEY, FINGERPRINT_KEY)]
    added = [pa.field(ENCODING_KEY, pa.large_string()), pa.field(FINGERPRINT_KEY, pa.string())]
    metadata = dict(schema.metadata or {})
    if _HUGGING_FACE in metadata:
        features = json.loads(metadata[_HUGGING_FACE])
        features.get("info", {}).get("features", {}).update(
            {field.name: {"dtype": str(field.type), "_type": "Value"} for field in added}
        )
        metadata[_HUGGING_FACE] = json.dumps(features).encode()
    return pa.schema([*kept, *added], metadata or None)


def with_encodings(table: pa.Table, metadata: Sequence[Metadata]) -> pa.Table:
    """Return a table with the columns of encodings; every other column is as it was."""
    pa = import_pyarrow()
    schema = output_schema(table.schema)
    added = {
        name: pa.array([row[name] for row in metadata], schema.field(name).type) for name in (ENCODING_KEY, FINGERPRINT_KEY)
    }
    return pa.Table.from_arrays([added[name] if name in added else table[name] for name in schema.names], schema=schema)


def to_rows(table: pa.Table, name: str) -> list[Row]:
    """Return the rows of a table for JSON.

    Raises:
        SettingsError: a column has a type that JSON lacks.
    """
    check_json(table.schema, name)
    rows: list[Row] = table.to_pylist()
    return rows


def check_json(schema: pa.Schema, name: str) -> None:
    """Check that JSON has the types of a schema.

    Raises:
        SettingsError: it lacks one.
    """
    for field in schema:
        if not _is_json(field.type):
            msg = f"{name} has the column {field.name!r} of type {field.type}, which JSON lacks; write Parquet"
            raise SettingsError(msg)


def _is_json(kind: pa.DataType) -> bool:
    types = import_pyarrow().types
    if types.is_dictionary(kind):
        return _is_json(kind.value_type)
    if types.is_struct(kind):
        return all(_is_json(kind.field(i).type) for i in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_json(kind.value_type)
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return is_text or any(check(kind) for check in (types.is_null, types.is_boolean, types.is_integer, types.is_floating))


def _merged(first: pa.Schema, second: pa.Schema) -> pa.Schema:
    pa = import_pyarrow()
    try:
        return pa.unify_schemas([first, second], promote_options="permissive")
    except pa.ArrowException as error:
        name = next((name for name in second.names if f"Field {name} " in str(error)), "")
        raise _no_type(name, str(error)) from error


def _without_nulls(kind: pa.DataType, name: str) -> pa.DataType:
    """Return a type in which what was never anything but null is a string."""
    pa = import_pyarrow()
    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_without_nulls(kind.value_type, name))
    if pa.types.is_struct(kind):
        if not kind.num_fields:
            raise _no_type(name, "its objects are all empty, which Parquet lacks")
        inner = (kind.field(i) for i in range(kind.num_fields))
        return pa.struct([field.with_type(_without_nulls(field.type, name)) for field in inner])
    return kind


def _no_type(name: str, reason: str) -> SettingsError:
    msg = (
        f"a column of Parquet must have one type for all rows, but field {name!r} has none ({reason}); write JSON lines, "
        "which take any value"
    )
    return SettingsError(msg)
