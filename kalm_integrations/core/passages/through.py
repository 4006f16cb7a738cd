"""Encodings into the payload store, where every reranker that has it finds them by their text."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from kalm_integrations.core.forks import renew_in_child
from kalm_integrations.core.passages.encoding import EncodedPassage
from kalm_integrations.core.passages.guarded import GuardedStore
from kalm_integrations.core.write_queue import WriteQueue

TOUCHES = 4096
"""Keys that were used and whose time is not written yet, after which it is."""

_queue = WriteQueue()


class WriteThrough:
    """Writes encodings into a payload store: in the background for queries, at once for bulk work."""

    def __init__(self, store: GuardedStore, max_bytes: int | None, count: Callable[..., None]) -> None:
        """Write to a store.

        Args:
            store: one whose failures are counted, and raise nothing.
            max_bytes: what the store may take; None leaves its size to others.
            count: told of what is written and evicted, as increments of `RuntimeStats`.
        """
        self._store = store
        self._max_bytes = max_bytes
        self._count = count
        self._renew()
        renew_in_child(self._renew)

    def _renew(self) -> None:
        """Begin with nothing: what waits at a fork is the parent's to write."""
        self._lock = threading.Lock()
        self._waiting: dict[str, EncodedPassage] = {}
        self._used: set[str] = set()

    def put(self, encodings: Iterable[EncodedPassage]) -> None:
        """Have encodings written after the answer, together with what else waits by then."""
        new = {encoding.payload_key: encoding for encoding in encodings}
        if new:
            with self._lock:
                self._waiting |= new
            if not _queue.add(self._store, len(new), self.write):
                with self._lock:
                    self._waiting = {key: encoding for key, encoding in self._waiting.items() if key not in new}

    def put_now(self, encodings: Iterable[EncodedPassage]) -> None:
        """Write encodings, and what else waits; the thread waits for the store."""
        with self._lock:
            self._waiting |= {encoding.payload_key: encoding for encoding in encodings}
        self.write()

    def touch(self, encodings: Iterable[EncodedPassage]) -> None:
        """Note that encodings were used, so that a bounded store keeps them longer than others."""
        if self._max_bytes is None:
            return
        with self._lock:
            self._used |= {encoding.payload_key for encoding in encodings}
            is_much = len(self._used) >= TOUCHES
        if is_much:
            _queue.add(self._store, 0, self.write)

    def write(self) -> None:
        """Write what waits, in one call of the store."""
        with self._lock:
            waiting, self._waiting = self._waiting, {}
            used, self._used = self._used, set()
        if waiting or used:
            payloads = {key: encoding.to_payload() for key, encoding in waiting.items()}
            n_evicted = self._store.offer(payloads, used, self._max_bytes)
            if n_evicted is not None:
                for encoding in waiting.values():
                    encoding.note_shared()
                self._count(store_writes=len(payloads), store_evictions=n_evicted)

    def flush(self, timeout: float | None) -> bool:
        """Return whether all that was put is written, or has failed, in time."""
        if self._used:
            _queue.add(self._store, 0, self.write)
        return _queue.wait(timeout)
