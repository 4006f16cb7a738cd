"""Files and folders that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Give a new file to write, which takes the place of `path` at the end; an error leaves what was there.

    Args:
        path: a file, which need not exist; the link's target if it is a link.

    Yields:
        The path of an empty file in the same folder, with a name of its own.
    """
    target = Path(os.path.realpath(path))
    part = _part(target)
    part.touch(exist_ok=False)
    try:
        if target.exists():
            part.chmod(target.stat().st_mode)
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def folder_written_beside(folder: Path) -> Iterator[Path]:
    """Give a new folder to fill, which is renamed to `folder` at the end; an error leaves nothing behind.

    Args:
        folder: must not exist at the end, or be empty.

    Yields:
        An empty folder beside it, with a name of its own.
    """
    part = _part(folder)
    part.mkdir(parents=True)
    try:
        yield part
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def nearest_existing(path: Path) -> Path:
    """Return a path, or the nearest folder above it that is there."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _part(target: Path) -> Path:
    return target.with_name(f"{target.name}.{secrets.token_hex(8)}.part")
