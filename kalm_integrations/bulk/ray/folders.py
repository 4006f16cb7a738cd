"""Folders on this machine or in an object store: which format the input has, and what the output says of its run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from kalm_integrations.bulk.state import EARLIER
from kalm_integrations.errors import EngineError, SettingsError

Kind: TypeAlias = Literal["jsonl", "parquet", "datasets"]

JSONL_EXTENSIONS = ["jsonl", "ndjson", "jsonl.gz", "ndjson.gz", "json", "json.gz"]
MANIFEST = "_kalm_run.json"
"""Readers of Parquet folders leave out files whose name begins with an underscore."""


def absolute(path: str) -> str:
    """Return a path that means the same on every node: an address such as s3://bucket/folder, or an absolute path."""
    return path if "://" in path else str(Path(path).expanduser().resolve())


def _open(path: str) -> tuple[fs.FileSystem, str]:
    try:
        found: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        msg = f"a path must be local or an address that Arrow knows, such as s3://bucket/folder, but {path!r} is not: {error}"
        raise SettingsError(msg) from error
    return found


@dataclass(frozen=True)
class Source:
    """Where rows come from."""

    path: str
    kind: Kind
    files: list[str]
    """Files to read; or the one folder that holds them."""


def find_source(source: str) -> Source:
    """Return what a path holds.

    Raises:
        SettingsError: there is nothing, or nothing of a format that is read here.
    """
    path = absolute(source)
    filesystem, place = _open(path)
    info = filesystem.get_file_info(place)
    if info.type == fs.FileType.NotFound:
        msg = f"the input must be a file or a folder that every node can read, but there is no {path!r}"
        raise SettingsError(msg)
    if info.type == fs.FileType.File:
        names = [info.base_name]
    else:
        found = filesystem.get_file_info(fs.FileSelector(place, recursive=True))
        names = [entry.base_name for entry in found if entry.type == fs.FileType.File]
    if "dataset_dict.json" in names:
        msg = f"the input must be one split, but {path!r} holds several; name the folder of one of them"
        raise SettingsError(msg)
    if "state.json" in names:
        with filesystem.open_input_stream(f"{place}/state.json") as file:
            state = json.loads(file.read())
        return Source(path, "datasets", [f"{path}/{entry['filename']}" for entry in state["_data_files"]])
    if any(name.endswith(".parquet") for name in names):
        return Source(path, "parquet", [path])
    if any(name.endswith(tuple(f".{extension}" for extension in JSONL_EXTENSIONS)) for name in names):
        return Source(path, "jsonl", [path])
    msg = (
        f"the input must be JSON lines (.jsonl, .ndjson, .json, gzipped or not), Parquet (.parquet), or a folder of them or "
        f"of datasets' save_to_disk, but {path!r} is neither"
    )
    raise SettingsError(msg)


class Output:
    """The folder that a run writes into."""

    def __init__(self, path: str, checkpoint: str | None) -> None:
        """Take the folder at `path`, which need not exist.

        Args:
            path: of the parts and the manifest.
            checkpoint: folder where Ray notes which rows are written; None takes one beside `path`.

        Raises:
            SettingsError: one is no path that Arrow knows.
        """
        self.path = absolute(path).rstrip("/")
        self.checkpoint = f"{self.path}.checkpoint" if checkpoint is None else absolute(checkpoint).rstrip("/")
        self._folder, self._notes = _open(self.path), _open(self.checkpoint)

    def begin(self, plan: dict[str, Any]) -> int | None:
        """Make a run's folder, or find it as the same run has left it.

        Args:
            plan: what makes the output; JSON.

        Returns:
            How many rows there are, if the run has been to its end.

        Raises:
            SettingsError: another run's output is there, or other files.
        """
        filesystem, place = self._folder
        if filesystem.get_file_info(f"{place}/{MANIFEST}").type == fs.FileType.File:
            with filesystem.open_input_stream(f"{place}/{MANIFEST}") as file:
                kept = json.loads(file.read())
            begun = {**EARLIER, **kept["plan"]}
            differing = [name for name, value in plan.items() if begun.get(name) != value]
            if differing:
                was = ", ".join(f"{name}={begun.get(name)!r}" for name in differing)
                now = ", ".join(f"{name}={plan[name]!r}" for name in differing)
                msg = f"a run must go on as it was begun, but {self.path!r} was begun with {was}, not {now}; name a new folder"
                raise SettingsError(msg)
            n_rows: int | None = kept["finished_with_rows"]
            return n_rows
        if filesystem.get_file_info(fs.FileSelector(place, allow_not_found=True)):
            msg = (
                f"the output must be a new or an empty folder, or one that the same run has begun, but {self.path!r} has files"
            )
            raise SettingsError(msg)
        filesystem.create_dir(place, recursive=True)
        self._write(plan, None)
        return None

    def finish(self, plan: dict[str, Any], n_rows: int) -> None:
        """Note that the run is at its end, and forget what was needed to go on.

        Raises:
            EngineError: the output has not as many rows as the input.
        """
        if (n_written := _count_rows(self._folder)) != n_rows:
            msg = (
                f"the output must have each of the {n_rows:,} rows once, but has {n_written:,} rows; did the input change, or "
                "another program write there? Encode into a new folder"
            )
            raise EngineError(msg)
        self._write(plan, n_rows)
        if self.has_checkpoint():
            filesystem, place = self._notes
            filesystem.delete_dir(place)

    def has_parts(self) -> bool:
        """Return whether a run has written anything."""
        return bool(_parts(self._folder))

    def has_checkpoint(self) -> bool:
        """Return whether Ray knows which rows are written."""
        filesystem, place = self._notes
        return bool(filesystem.get_file_info(place).type == fs.FileType.Directory)

    def count_kept(self) -> int:
        """Return how many rows are written for good."""
        return _count_rows(self._notes)

    def _write(self, plan: dict[str, Any], n_rows: int | None) -> None:
        filesystem, place = self._folder
        with filesystem.open_output_stream(f"{place}/{MANIFEST}") as file:
            file.write(json.dumps({"plan": plan, "finished_with_rows": n_rows}, indent=1).encode())


def _parts(folder: tuple[fs.FileSystem, str]) -> list[str]:
    filesystem, place = folder
    found = filesystem.get_file_info(fs.FileSelector(place, allow_not_found=True))
    return [file.path for file in found if file.path.endswith(".parquet") and not file.path.endswith(".pending.parquet")]


def _count_rows(folder: tuple[fs.FileSystem, str]) -> int:
    """Return how many rows the Parquet files in a folder say they have."""
    filesystem, _ = folder
    return sum(pq.read_metadata(path, filesystem=filesystem).num_rows for path in _parts(folder))
