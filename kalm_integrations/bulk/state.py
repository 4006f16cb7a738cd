"""What a run keeps beside its output until it is whole: a lock that ends with the process, and what is done so far."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kalm_integrations.bulk.rows import RowCounts
from kalm_integrations.core.base import Reranker
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting.models import fingerprints_of

SUFFIX = ".partial"
"""Of the folder beside an output in which it grows."""
MANIFEST = "_manifest"
VERSION = 1
EARLIER = {"long_passages": "cut"}
"""What a run did that was begun before its settings said so."""


def encoder_settings(reranker: Reranker) -> dict[str, str | None]:
    """Return the settings by which a run tells whether another one encodes as it does."""
    whole, *of_windows = fingerprints_of(reranker)
    if not of_windows:
        return {"fingerprint": whole, "long_passages": "cut", "windows_fingerprint": None}
    return {"fingerprint": whole, "long_passages": "windows", "windows_fingerprint": of_windows[0]}


@dataclass(frozen=True)
class Progress:
    """What is done of an output, by this run and those before it."""

    windows: int = 0
    rows: int = 0
    n_bytes: int = 0
    """Of the output."""
    counts: RowCounts = field(default_factory=RowCounts)
    is_complete: bool = False
    """Whether nothing is left but to put the output in its place."""


class WorkFolder:
    """The folder beside an output in which it grows, locked against other runs."""

    def __init__(self, target: Path) -> None:
        """Make or find the folder, and lock it.

        Raises:
            SettingsError: another run has it.
        """
        self.target = target
        self.path = target.with_name(target.name + SUFFIX)
        while True:
            self.path.mkdir(exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                msg = (
                    f"an output must have one run at a time, but another one is writing {str(target)!r}; wait until it ends, "
                    "or name another output"
                )
                raise SettingsError(msg) from None
            # One that has just ended may have removed what was locked here.
            if self.path.exists() and self.path.stat().st_ino == os.fstat(self._lock).st_ino:
                return
            os.close(self._lock)

    def close(self) -> None:
        """Let others have the folder; one without a manifest is removed."""
        if not (self.path / MANIFEST).exists():
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def load(self) -> tuple[dict[str, Any], Progress] | None:
        """Return with which settings the output was begun and what is done, or None if there is nothing.

        Raises:
            SettingsError: what is there is no manifest.
        """
        path = self.path / MANIFEST
        try:
            found = json.loads(path.read_bytes())
            progress = dict(found["progress"])
            return {**EARLIER, **found["settings"]}, Progress(**{**progress, "counts": RowCounts(**progress["counts"])})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            msg = f"{path} must be what an earlier run wrote, but cannot be read ({error}); remove {self.path} to begin anew"
            raise SettingsError(msg) from error

    def save(self, settings: Mapping[str, Any], progress: Progress) -> None:
        """Write what is done, durably; what it speaks of must be durable before."""
        path = self.path / MANIFEST
        part = path.with_name(MANIFEST + ".new")
        with part.open("wb") as file:
            file.write(json.dumps({"version": VERSION, "settings": dict(settings), "progress": asdict(progress)}).encode())
            sync(file.fileno())
        part.replace(path)
        sync_folder(self.path)

    def clear(self) -> None:
        """Remove what is there, the manifest first."""
        (self.path / MANIFEST).unlink(missing_ok=True)
        for path in self.path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def remove(self) -> None:
        """Remove the folder: the output is in its place."""
        shutil.rmtree(self.path)


def check_same(begun: Mapping[str, Any], settings: Mapping[str, Any], target: Path) -> None:
    """Check that a run goes on with what an earlier one began.

    Raises:
        SettingsError: something else was given; the message names it.
    """
    for name in {**begun, **settings}:
        if begun.get(name) != settings.get(name):
            msg = (
                f"the output {str(target)!r} was begun with {name}={begun.get(name)!r}, but this run has "
                f"{settings.get(name)!r}; give the same to go on, or overwrite=True (--overwrite) to begin anew"
            )
            raise SettingsError(msg)


def sync(file: int) -> None:
    """Have what was written to a file on disk."""
    os.fsync(file)


def sync_folder(path: Path) -> None:
    """Have the names in a folder on disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
