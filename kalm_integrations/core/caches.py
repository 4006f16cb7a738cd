"""What is kept outside the host's metadata: bounded in-memory caches, and a byte store on disk."""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable, Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakValueDictionary

import lmdb
from cachetools import LRUCache

CacheKey = tuple[str, str]
"""Fingerprint and text hash."""

Key = TypeVar("Key", bound=Hashable)


class Sized(Protocol):
    """Something that knows how many bytes it takes."""

    @property
    def nbytes(self) -> int:
        """Bytes."""


Entry = TypeVar("Entry", bound=Sized)


class BoundedCache(Generic[Key, Entry]):
    """Least-recently-used encodings or prefix states, bounded by their bytes."""

    def __init__(self, max_bytes: int) -> None:
        """Make an empty cache; 0 bytes keeps nothing."""
        self._entries: LRUCache[Key, Entry] = LRUCache(max_bytes, getsizeof=lambda entry: entry.nbytes)
        self._lock = threading.Lock()

    @property
    def max_bytes(self) -> int:
        """The bound."""
        return int(self._entries.maxsize)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return int(self._entries.currsize)

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._entries)

    def get_many(self, keys: Iterable[Key]) -> dict[Key, Entry]:
        """Return those of the keys that are there."""
        with self._lock:
            found = ((key, self._entries.get(key)) for key in keys)
            return {key: entry for key, entry in found if entry is not None}

    def put_many(self, entries: Mapping[Key, Entry]) -> None:
        """Add entries, dropping the least recently used; one that is larger than the bound is not kept."""
        with self._lock:
            for key, entry in entries.items():
                if entry.nbytes <= self.max_bytes:
                    self._entries[key] = entry

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._entries.clear()


MAX_READERS = 1024
"""Reads that may be under way at once, in all processes together."""

_environments: WeakValueDictionary[str, lmdb.Environment] = WeakValueDictionary()
_environments_lock = threading.Lock()


class LmdbPayloadStore(MutableMapping[str, bytes]):
    """Payloads of reference-mode encodings in an LMDB environment: one folder, many readers, any number of processes.

    Stores of the same folder share its environment, which is closed with the last of them. Keys are 1 to 511 bytes of UTF-8.
    Open the store after a fork, not before.
    """

    def __init__(self, path: str | os.PathLike[str], max_bytes: int = 2**40) -> None:
        """Open or create the store.

        Args:
            path: its folder.
            max_bytes: the size it may grow to; a limit, not an allocation. Where the process has the folder open already,
                that limit holds.
        """
        Path(path).mkdir(parents=True, exist_ok=True)
        folder = os.path.realpath(path)
        # LMDB allows one environment per folder and process, but every reranker opens a store of its own.
        with _environments_lock:
            environment = _environments.get(folder)
            if environment is None:
                environment = lmdb.open(folder, map_size=max_bytes, max_readers=MAX_READERS)
                _environments[folder] = environment
        self._environment = environment

    def __getitem__(self, key: str) -> bytes:
        """Return a payload."""
        with self._environment.begin() as transaction:
            value = transaction.get(key.encode())
        if value is None:
            raise KeyError(key)
        return bytes(value)

    def __setitem__(self, key: str, value: bytes) -> None:
        """Write a payload durably; `update` writes many at the price of one."""
        self.update({key: value})

    def __delitem__(self, key: str) -> None:
        """Delete a payload."""
        with self._environment.begin(write=True) as transaction:
            if not transaction.delete(key.encode()):
                raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        """Go through the keys, in order."""
        with self._environment.begin() as transaction:
            for key in transaction.cursor().iternext(keys=True, values=False):
                yield bytes(key).decode()

    def __len__(self) -> int:
        """Return the number of payloads."""
        return int(self._environment.stat()["entries"])

    def update(self, *args: Any, **kwargs: bytes) -> None:
        """Write many payloads in one transaction."""
        with self._environment.begin(write=True) as transaction:
            for key, value in dict(*args, **kwargs).items():
                transaction.put(key.encode(), value)
