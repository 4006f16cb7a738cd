"""What a checkpoint's files were when it was opened, and their hashes: what is loaded late must be what was hashed."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from kalm_integrations.errors import InvalidCheckpointError


class Stamp(NamedTuple):
    """What tells a file from another one in its place; one of the three alone can stay the same."""

    size: int
    written: int
    """In nanoseconds."""
    inode: int


def stamp_of(path: Path) -> Stamp | None:
    """Return the stamp of a file, or None if no regular file is there."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ino) if stat.S_ISREG(found.st_mode) else None


def folder_stamps(folder: Path) -> tuple[tuple[str, Stamp], ...]:
    """Return the names and stamps of a folder's files, sorted: a folder that was written anew has others."""
    stamps = ((path.name, stamp_of(path)) for path in folder.glob("*"))
    return tuple(sorted((name, stamp) for name, stamp in stamps if stamp is not None))


class OpenFiles:
    """Files that must stay as they are while their checkpoint is open."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Remember what the files are now; one that is not there must not appear either."""
        self._stamps = {path: stamp_of(path) for path in paths}

    @property
    def nbytes(self) -> int:
        """The size that they had."""
        return sum(stamp.size for stamp in self._stamps.values() if stamp is not None)

    def check(self, paths: Iterable[Path] | None = None) -> None:
        """Check that files still are what they were; None: all of them.

        Raises:
            InvalidCheckpointError: one was deleted, written anew or put there.
        """
        for path in self._stamps if paths is None else paths:
            if stamp_of(path) != self._stamps[path]:
                raise _changed(path)


_hashes: dict[tuple[str, Stamp], str] = {}
_hashes_lock = threading.Lock()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hex. A process reads each file once for that, as long as it stays the same.

    Raises:
        InvalidCheckpointError: the file changed meanwhile, or it lies in the hub's cache under the hash of other bytes.
    """
    target, stamp = Path(os.path.realpath(path)), stamp_of(path)
    if stamp is None:
        raise _changed(path)
    # Held while a file is read, so that two threads do not read the same one.
    with _hashes_lock:
        found = _hashes.get((str(target), stamp))
        if found is not None:
            return found
        digest = hashlib.sha256()
        with target.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        if stamp_of(target) != stamp:
            raise _changed(path)
        made = digest.hexdigest()
        # The hub's cache names large files by their SHA-256.
        is_named_by_hash = target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name)
        if is_named_by_hash and target.name != made:
            msg = (
                f"{target} must hold the bytes whose SHA-256 is its name, but theirs is {made}: it was damaged or replaced; "
                "delete it and fetch the checkpoint again"
            )
            raise InvalidCheckpointError(msg)
        _hashes[str(target), stamp] = made
        return made


def _changed(path: Path) -> InvalidCheckpointError:
    return InvalidCheckpointError(
        f"{path} must stay as it is while its checkpoint is open, but was deleted or written anew; open it again"
    )
