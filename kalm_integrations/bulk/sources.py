"""Corpora in: text of every format, Parquet, and folders of Hugging Face datasets, read as a stream of blocks of rows."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalm_integrations.bulk.arrow import import_datasets, import_pyarrow
from kalm_integrations.core.types import ENCODING_KEY
from kalm_integrations.corpora.candidates import Candidate, read_candidates
from kalm_integrations.corpora.jsonl import PassageFields, parse_each, to_json
from kalm_integrations.corpora.text import STREAM, name_of
from kalm_integrations.errors import SettingsError

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_BLOCK = 256
ROWS_PER_BATCH = 1024
"""Of a table, read at a time."""

Report = Callable[[str], None]


@dataclass(frozen=True)
class Block:
    """Consecutive rows; a window of rows that are encoded together is one too."""

    candidates: Sequence[Candidate]
    """Passages; of a table their rows have only what is needed to encode."""
    table: pa.Table | None = None
    """The same rows, whole, where they come as a table."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.candidates)

    def part(self, start: int, stop: int) -> Block:
        """Return some of the rows."""
        return Block(self.candidates[start:stop], None if self.table is None else self.table.slice(start, stop - start))


class Source(ABC):
    """A corpus that is read from its beginning to its end, any number of times unless it is a stream."""

    is_stream = False
    schema: pa.Schema | None = None
    """Of a corpus that is a table."""

    def __init__(self, path: Path, fields: PassageFields) -> None:
        """Read a file or folder."""
        self.path = path
        self.name = name_of(path)
        self.fields = fields

    @abstractmethod
    def read(self, report: Report | None = None) -> Iterator[Block]:
        """Read the rows; bad ones are told to `report` and left out.

        Raises:
            SettingsError: a row is bad, and there is no `report`.
        """

    @abstractmethod
    def scan(self, report: Report | None = None) -> Iterator[Block]:
        """Do what `read` does, but of a table with nothing but the passages."""

    @abstractmethod
    def identify(self, block: Block) -> Iterable[bytes]:
        """Return what tells rows from others."""

    def identity(self) -> bytes:
        """Return what tells the corpus from others beside its rows."""
        return b""


class TextSource(Source):
    """JSON lines, a JSON array, CSV or TSV, gzipped or not; or standard input."""

    def __init__(self, path: Path, fields: PassageFields) -> None:
        """Read a file, or - for standard input."""
        super().__init__(path, fields)
        self.is_stream = path == STREAM or not path.is_file()

    def read(self, report: Report | None = None) -> Iterator[Block]:
        """Read the rows."""
        candidates = read_candidates(self.path, self.fields, report)
        while block := list(islice(candidates, ROWS_PER_BLOCK)):
            yield Block(block)

    scan = read

    def identify(self, block: Block) -> Iterable[bytes]:
        """Return the rows."""
        return (to_json(candidate.row) for candidate in block.candidates)


class TableSource(Source):
    """Rows that come as tables."""

    schema: pa.Schema

    @abstractmethod
    def _tables(self, columns: list[str]) -> Iterator[pa.Table]:
        """Read some columns."""

    def read(self, report: Report | None = None) -> Iterator[Block]:
        """Read the rows."""
        return self._blocks(self.schema.names, report)

    def scan(self, report: Report | None = None) -> Iterator[Block]:
        """Read the passages."""
        return self._blocks(self._needed(), report)

    def identify(self, block: Block) -> Iterable[bytes]:
        """Return the passages: the rest is in `identity`."""
        return (candidate.text.encode("utf-8", "surrogatepass") for candidate in block.candidates)

    def _needed(self) -> list[str]:
        wanted = (self.fields.text, self.fields.title)
        return [name for name in dict.fromkeys(wanted) if name is not None and name in self.schema.names]

    def _blocks(self, columns: list[str], report: Report | None) -> Iterator[Block]:
        source = f"{self.name}, row "
        needed = [name for name in (*self._needed(), ENCODING_KEY) if name in columns]
        n_read = 0
        for table in self._tables(columns):
            rows: list[dict[str, Any]] = table.select(needed).to_pylist() if needed else [{} for _ in range(len(table))]
            parsed = parse_each(enumerate(rows, 1 + n_read), source, lambda row: (row, self.fields.read(row)), report)
            candidates = [Candidate(f"{source}{number}", number, row, text) for number, (row, text) in parsed]
            if len(candidates) < len(rows):
                table = table.take([candidate.number - 1 - n_read for candidate in candidates])
            n_read += len(rows)
            yield Block(candidates, table)


class ParquetSource(TableSource):
    """A Parquet file, or a folder of them."""

    def __init__(self, path: Path, fields: PassageFields) -> None:
        """Read the schemas.

        Raises:
            SettingsError: a file is no Parquet, or their schemas cannot be one.
        """
        super().__init__(path, fields)
        pa = import_pyarrow()
        self.files = parquet_files(path)
        schemas = []
        for file in self.files:
            try:
                schemas.append(pa.parquet.read_schema(file))
            except (pa.ArrowException, OSError) as error:
                msg = f"{file} must be a Parquet file, but cannot be read ({error})"
                raise SettingsError(msg) from error
        try:
            self.schema = pa.unify_schemas(schemas, promote_options="permissive")
        except pa.ArrowException as error:
            msg = f"the Parquet files of {path} must have one schema, but have not ({error}); encode them one by one"
            raise SettingsError(msg) from error

    def identity(self) -> bytes:
        """Return the ends of the files, in which Parquet keeps the places and the statistics of all columns."""
        digest = hashlib.blake2b()
        for path in self.files:
            with path.open("rb") as file:
                n_bytes = path.stat().st_size
                file.seek(max(0, n_bytes - 2**16))
                digest.update(b"%d " % n_bytes + file.read())
        return digest.digest()

    def _tables(self, columns: list[str]) -> Iterator[pa.Table]:
        pa = import_pyarrow()
        schema = pa.schema([self.schema.field(name) for name in columns], self.schema.metadata)
        for path in self.files:
            with pa.parquet.ParquetFile(path) as file:
                there = [name for name in columns if name in file.schema_arrow.names]
                for batch in file.iter_batches(ROWS_PER_BATCH, columns=there):
                    yield _as_schema(pa.Table.from_batches([batch]), schema)


class DatasetSource(TableSource):
    """A folder that `save_to_disk` of Hugging Face datasets wrote."""

    def __init__(self, path: Path, fields: PassageFields) -> None:
        """Open the dataset.

        Raises:
            SettingsError: the folder has several splits.
        """
        super().__init__(path, fields)
        datasets = import_datasets()
        dataset = datasets.load_from_disk(str(path))
        if isinstance(dataset, datasets.DatasetDict):
            splits = ", ".join(str(path / name) for name in dataset)
            msg = f"a dataset must be one split, but {str(path)!r} has several; name one of: {splits}"
            raise SettingsError(msg)
        self._dataset = dataset
        self.schema = dataset.features.arrow_schema

    def identity(self) -> bytes:
        """Return the file in which datasets keep the fingerprint of their content."""
        return (self.path / "state.json").read_bytes()

    def _tables(self, columns: list[str]) -> Iterator[pa.Table]:
        pa = import_pyarrow()
        schema = pa.schema([self.schema.field(name) for name in columns], self.schema.metadata)
        selected = self._dataset.select_columns(columns).with_format("arrow")
        for table in selected.iter(ROWS_PER_BATCH):
            yield _as_schema(table, schema)


def open_source(path: Path, fields: PassageFields) -> Source:
    """Return a corpus by what lies at a path.

    Raises:
        SettingsError: it is a folder of something else.
        MissingExtraError: what reads it is not installed.
    """
    if path == STREAM or not path.exists():
        return TextSource(path, fields)
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return DatasetSource(path, fields)
        return ParquetSource(path, fields)
    is_parquet = path.suffix.lower() == ".parquet"
    if path.is_file() and not is_parquet:
        with path.open("rb") as file:
            is_parquet = file.read(4) == b"PAR1"
    return (ParquetSource if is_parquet else TextSource)(path, fields)


def parquet_files(path: Path) -> list[Path]:
    """Return the files of a Parquet file or folder in order; those whose name begins with _ or . are no data.

    Raises:
        SettingsError: a folder has none.
    """
    if path.is_file():
        return [path]
    files = sorted(path.rglob("*.parquet"))
    data = [file for file in files if not any(part.startswith(("_", ".")) for part in file.relative_to(path).parts)]
    if not data:
        msg = (
            f"a folder must have Parquet files, or be a dataset that Hugging Face's save_to_disk wrote, but {str(path)!r} is "
            "neither"
        )
        raise SettingsError(msg)
    return data


def cut_windows(blocks: Iterable[Block], max_rows: int, max_characters: int) -> Iterator[Block]:
    """Cut rows into windows to encode together: where they end depends on the rows alone, not on how they were read.

    Args:
        blocks: rows.
        max_rows: of a window.
        max_characters: a window ends with the row that reaches them.
    """
    parts: list[Block] = []
    n_rows = n_characters = 0
    for block in blocks:
        start = 0
        for index, candidate in enumerate(block.candidates, 1):
            n_rows += 1
            n_characters += len(candidate.text)
            if n_rows >= max_rows or n_characters >= max_characters:
                yield _joined([*parts, block.part(start, index)])
                parts, start, n_rows, n_characters = [], index, 0, 0
        if start < len(block):
            parts.append(block.part(start, len(block)))
    if parts:
        yield _joined(parts)


def _joined(parts: Sequence[Block]) -> Block:
    tables = [part.table for part in parts if part.table is not None]
    table = import_pyarrow().concat_tables(tables) if tables else None
    return Block([candidate for part in parts for candidate in part.candidates], table)


def _as_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return a table with the columns of a schema; those that a file lacks are null."""
    pa = import_pyarrow()
    if table.schema.equals(schema):
        return table.replace_schema_metadata(schema.metadata)
    columns = [
        table[field.name].cast(field.type) if field.name in table.schema.names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)
