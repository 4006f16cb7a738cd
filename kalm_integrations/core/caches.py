"""Bounded in-memory caches, safe to share between threads."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

from cachetools import LRUCache

from kalm_integrations.core.encoding import EncodedPassage

CacheKey = tuple[str, str]
"""Fingerprint and text hash."""


class EncodingCache:
    """Least-recently-used encodings, bounded by the bytes of their states."""

    def __init__(self, max_bytes: int) -> None:
        """Make an empty cache; 0 bytes keeps nothing."""
        self._entries: LRUCache[CacheKey, EncodedPassage] = LRUCache(max_bytes, getsizeof=lambda entry: entry.nbytes)
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
        """Return the number of encodings."""
        return len(self._entries)

    def get_many(self, keys: Iterable[CacheKey]) -> dict[CacheKey, EncodedPassage]:
        """Return those of the keys that are there."""
        with self._lock:
            found = ((key, self._entries.get(key)) for key in keys)
            return {key: entry for key, entry in found if entry is not None}

    def put_many(self, entries: Mapping[CacheKey, EncodedPassage]) -> None:
        """Add encodings, dropping the least recently used; one that is larger than the bound is not kept."""
        with self._lock:
            for key, entry in entries.items():
                if entry.nbytes <= self.max_bytes:
                    self._entries[key] = entry

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._entries.clear()
