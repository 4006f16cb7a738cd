"""Outputs of bulk encoding: JSON lines, Parquet, a stream, or none but the payload store."""

from __future__ import annotations

import gzip
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from kalm_integrations.bulk.arrow import check_json, import_pyarrow, output_schema, to_rows, to_table, with_encodings
from kalm_integrations.bulk.sources import Block
from kalm_integrations.bulk.state import sync, sync_folder
from kalm_integrations.core.types import ENCODING_KEY, Metadata
from kalm_integrations.corpora.jsonl import to_json
from kalm_integrations.errors import SettingsError

if TYPE_CHECKING:
    import pyarrow as pa

_OLD = ".replaced"
"""Of the name of what was there, while it is replaced."""


class Output(ABC):
    """Takes windows of rows, in order."""

    @abstractmethod
    def write(self, number: int, window: Block, metadata: Sequence[Metadata]) -> int:
        """Write a window durably, and return its bytes."""


class NoRows(Output):
    """Takes nothing: the payload store has the encodings."""

    def write(self, number: int, window: Block, metadata: Sequence[Metadata]) -> int:
        """Write nothing."""
        del number, window, metadata
        return 0


class StreamOutput(Output):
    """JSON lines to a pipe or device."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        """Write to an open file."""
        self._file = file
        self._name = name

    def write(self, number: int, window: Block, metadata: Sequence[Metadata]) -> int:
        """Write a window."""
        del number
        data = _to_lines(window, metadata, self._name)
        self._file.write(data)
        self._file.flush()
        return len(data)


class FileOutput(Output):
    """An output that grows in a work folder and is put in its place when it is whole."""

    def __init__(self, target: Path, folder: Path) -> None:
        """Write to a folder what is to lie at `target`."""
        self.target = target
        self.folder = folder

    @abstractmethod
    def resume(self, n_windows: int, n_bytes: int) -> None:
        """Go on behind so many windows and bytes; what was written after them is dropped."""

    @abstractmethod
    def finish(self, n_windows: int) -> None:
        """Write what is still missing, when there are no more windows."""

    @property
    @abstractmethod
    def grown(self) -> Path:
        """What is to be put in its place."""

    def publish(self) -> None:
        """Put the output in its place; done again, it goes on where it was stopped."""
        old = self.folder / _OLD
        if self.grown.exists():
            if self.target.is_dir():
                # A folder cannot be replaced by one step: what was there is removed when the new one is in place.
                self.target.replace(old)
            target = Path(os.path.realpath(self.target))
            if target.is_file():
                self.grown.chmod(target.stat().st_mode)
            self.grown.replace(target)
            sync_folder(target.parent)
        shutil.rmtree(old, ignore_errors=True)


class JsonLinesOutput(FileOutput):
    """One file of JSON lines; if its name ends in .gz, a member of gzip for every window."""

    @property
    def grown(self) -> Path:
        """The file."""
        return self.folder / "rows"

    def resume(self, n_windows: int, n_bytes: int) -> None:
        """Cut the file."""
        del n_windows
        with self.grown.open("ab") as file:
            if file.tell() < n_bytes:
                msg = (
                    f"{self.grown} must have the {n_bytes:,} bytes that an earlier run wrote, but has {file.tell():,}; remove "
                    f"{self.folder} to begin anew"
                )
                raise SettingsError(msg)
            file.truncate(n_bytes)

    def write(self, number: int, window: Block, metadata: Sequence[Metadata]) -> int:
        """Append a window."""
        del number
        data = _to_lines(window, metadata, str(self.target))
        if self.target.suffix == ".gz":
            data = gzip.compress(data, 6, mtime=0)
        with self.grown.open("ab") as file:
            file.write(data)
            file.flush()
            sync(file.fileno())
        return len(data)

    def finish(self, n_windows: int) -> None:
        """Write nothing: the file is there since `resume`."""


class ParquetOutput(FileOutput):
    """A folder of Parquet files, one for every window."""

    def __init__(self, target: Path, folder: Path, schema: pa.Schema | None) -> None:
        """Write files of a schema, without the columns of encodings; None takes that of the first window."""
        super().__init__(target, folder)
        self._schema = schema

    @property
    def grown(self) -> Path:
        """The folder."""
        return self.folder / "parts"

    def resume(self, n_windows: int, n_bytes: int) -> None:
        """Remove the files of later windows."""
        del n_bytes
        self.grown.mkdir(exist_ok=True)
        kept = {part_name(number) for number in range(n_windows)}
        for path in self.grown.iterdir():
            if path.name not in kept:
                path.unlink()
            kept.discard(path.name)
        if kept:
            msg = (
                f"{self.grown} must have the files that an earlier run wrote, but lacks {min(kept)}; remove {self.folder} to "
                "begin anew"
            )
            raise SettingsError(msg)

    def write(self, number: int, window: Block, metadata: Sequence[Metadata]) -> int:
        """Write a window's file."""
        table = window.table
        if table is None:
            rows = [candidate.row for candidate in window.candidates]
            if self._schema is None:
                self._schema = schema_of(rows)
            table = to_table(rows, self._schema)
        return self._write(number, with_encodings(table, metadata))

    def finish(self, n_windows: int) -> None:
        """Write a file without rows if there is no other."""
        if not n_windows:
            pa = import_pyarrow()
            self._write(0, output_schema(self._schema or pa.schema([])).empty_table())

    def _write(self, number: int, table: pa.Table) -> int:
        path = self.grown / part_name(number)
        part = path.with_name(f"_{path.name}")
        # An encoding has nothing to compare, and its extremes would fill the file's end.
        compared = [name for name in table.schema.names if name != ENCODING_KEY]
        with part.open("wb") as file:
            import_pyarrow().parquet.write_table(
                table, file, compression="zstd", use_dictionary=False, write_statistics=compared
            )
            file.flush()
            sync(file.fileno())
            n_bytes = file.tell()
        part.replace(path)
        sync_folder(self.grown)
        return n_bytes


def part_name(number: int) -> str:
    """Return the name of a file of Parquet output."""
    return f"part-{number:05}.parquet"


def schema_of(rows: Sequence[dict[str, object]]) -> pa.Schema:
    """Return the schema of rows."""
    from kalm_integrations.bulk.arrow import RowSchema

    found = RowSchema()
    found.add(rows)
    return found.finished()


def check_columns(schema: pa.Schema | None, output: Path | None, name: str) -> None:
    """Check that an output takes the columns of a corpus that is a table.

    Raises:
        SettingsError: it is JSON, which lacks a type.
    """
    if schema is not None and output is not None and output.suffix != ".parquet":
        check_json(schema, name)


def _to_lines(window: Block, metadata: Sequence[Metadata], name: str) -> bytes:
    rows = [candidate.row for candidate in window.candidates] if window.table is None else to_rows(window.table, name)
    return b"".join(to_json({**row, **added}) + b"\n" for row, added in zip(rows, metadata, strict=True))
