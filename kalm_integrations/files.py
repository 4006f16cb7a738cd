"""Files and folders that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
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
    descriptor, name = tempfile.mkstemp(prefix=f"{target.name}.", suffix=".part", dir=target.parent)
    os.close(descriptor)
    part = Path(name)
    try:
        # As a file that is opened for writing would be, and not for its owner alone.
        part.chmod(target.stat().st_mode if target.exists() else 0o666 & ~_umask())
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        part.chmod(0o777 & ~_umask())
        yield part
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
