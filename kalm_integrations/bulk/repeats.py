"""Texts that a corpus has several times: found before anything is encoded, and their encodings kept, on disk."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

HASHES_AT_ONCE = 2**22
"""Hashes that are sorted in memory at a time: 32 MiB."""


def hash_texts(texts: Iterable[str]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Return 64-bit hashes: two texts with one hash are taken for one that may repeat, which costs nothing but room."""
    digests = (hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(digests), dtype="<u8")


def find_repeated(path: Path) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Return, sorted, the hashes that a file has more than once; memory holds a part of the file at a time."""
    n_hashes = path.stat().st_size // 8
    n_parts = max(1, -(-n_hashes // HASHES_AT_ONCE))
    bounds = [part * 2**64 // n_parts for part in range(n_parts + 1)]
    repeated = [np.empty(0, np.uint64)]
    for low, high in pairwise(bounds):
        of_part = [np.empty(0, np.uint64)]
        with path.open("rb") as file:
            while len(hashes := np.fromfile(file, "<u8", HASHES_AT_ONCE)):
                of_part.append(hashes[(hashes >= np.uint64(low)) & (hashes <= np.uint64(high - 1))])
        ordered = np.sort(np.concatenate(of_part))
        repeated.append(np.unique(ordered[1:][ordered[1:] == ordered[:-1]]))
    return np.concatenate(repeated)


class RepeatedTexts:
    """Encodings of texts that repeat, in a SQLite file, by the window in which they were made.

    What windows wrote that are done anew is forgotten: they are encoded as if nothing had happened.
    """

    def __init__(self, path: Path, repeated: np.ndarray[Any, np.dtype[np.uint64]], n_windows: int) -> None:
        """Open or make the file.

        Args:
            path: of the file.
            repeated: hashes of the texts, sorted.
            n_windows: how many windows are done.
        """
        self._repeated = repeated
        self._database = sqlite3.connect(path)
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS encodings (text BLOB PRIMARY KEY, encoding TEXT NOT NULL, number INTEGER NOT NULL)"
        )
        self._database.execute("DELETE FROM encodings WHERE number >= ?", (n_windows,))
        self._database.commit()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def find(self, texts: Sequence[str]) -> tuple[set[str], dict[str, str]]:
        """Return those of the texts that repeat, and the encodings that are there."""
        if not len(self._repeated):
            return set(), {}
        hashes = hash_texts(texts)
        places = np.minimum(np.searchsorted(self._repeated, hashes), len(self._repeated) - 1)
        repeating = {text for text, is_there in zip(texts, self._repeated[places] == hashes, strict=True) if is_there}
        found = {}
        for text in repeating:
            row = self._database.execute("SELECT encoding FROM encodings WHERE text = ?", (_key(text),)).fetchone()
            if row is not None:
                found[text] = row[0]
        return repeating, found

    def add(self, encodings: Iterable[tuple[str, str]], number: int) -> None:
        """Keep encodings of texts, durably, as those of a window."""
        rows = [(_key(text), encoding, number) for text, encoding in encodings]
        if rows:
            self._database.executemany("INSERT OR IGNORE INTO encodings VALUES (?, ?, ?)", rows)
            self._database.commit()


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
