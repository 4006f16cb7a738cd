"""Caches in memory, bounded by the bytes that they hold."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, Protocol, TypeVar

from cachetools import LRUCache

from kalm_integrations.core.forks import ForkSafeLock

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
        self._lock = ForkSafeLock()

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

    def drop_many(self, keys: Iterable[Key]) -> None:
        """Drop those of the keys that are there."""
        with self._lock:
            for key in keys:
                self._entries.pop(key, None)

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._entries.clear()
