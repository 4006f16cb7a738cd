"""Stores that belong to others and may fail: what a query reads or keeps there is computed when they do."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from kalm_integrations.errors import KalmError, StoreError

logger = logging.getLogger(__name__)

SLOW_SECONDS = 2.0
"""A read that takes longer, or a write that takes longer for each of its values, counts as a failure."""
PAUSE_SECONDS = 30.0
"""How long a store that failed is left alone, so that a dead server costs one time-out and not one for each passage."""


class GuardedStore(MutableMapping[str, bytes]):
    """A payload or prefix store through which no query fails.

    `get` answers None whatever the store does. A store that failed or was slow is left alone for `PAUSE_SECONDS`, then tried
    with one call; reading and writing pause apart, because a store that is full or read-only still answers.
    """

    def __init__(
        self,
        store: MutableMapping[str, bytes],
        name: str,
        count: Callable[..., None],
        *,
        must_write: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Guard a store.

        Args:
            store: what the user gave.
            name: the setting, for messages.
            count: told of each failure, as an increment of `RuntimeStats.store_failures`.
            must_write: whether a failed write is an error, because what was written will be referred to.
            clock: the time in seconds.
        """
        self._store = store
        self._name = name
        self._count = count
        self._must_write = must_write
        self._clock = clock
        self._reading, self._writing = _Pause(), _Pause()
        self._logged: dict[str, object] = {}

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, or the default if the store has none, fails, or holds anything but bytes."""
        value = self._read(lambda: self._store.get(key))
        if value is None or isinstance(value, bytes):
            return default if value is None else value
        self._fail(f"it must hold bytes, but has {type(value).__name__}", f"holds {type(value).__name__}")
        return default

    def get_many(self, keys: Iterable[str]) -> dict[str, bytes]:
        """Return those of the values that are there, in one call if the store has a method of this name; see `get`."""
        get_many = getattr(self._store, "get_many", None)
        if get_many is None:
            return {key: value for key in keys if (value := self.get(key)) is not None}
        found = self._read(lambda: dict(get_many(list(keys)))) or {}
        values = {key: value for key, value in found.items() if isinstance(value, bytes)}
        if len(values) < len(found):
            self._fail("it must hold bytes, but has something else", "holds something else")
        return values

    def update(self, *args: Any, **kwargs: bytes) -> None:
        """Write values.

        Raises:
            StoreError: the store failed and `must_write` is set; else that is logged and counted.
        """
        values = dict(*args, **kwargs)
        self._write(lambda: self._put(values), len(values))

    def offer(self, values: Mapping[str, bytes], used: Collection[str], max_bytes: int | None) -> int | None:
        """Write values that the store need not keep.

        Args:
            values: by key.
            used: keys of what was used since the last call.
            max_bytes: what the store may take, for one that has `keep_recent`; None leaves that to the store.

        Returns:
            How many the store has deleted to keep to the bound; None if it failed.

        Raises:
            StoreError: see `update`.
        """
        return self._write(lambda: self._put(values, used, max_bytes), len(values))

    def _put(self, values: Mapping[str, bytes], used: Collection[str] = (), max_bytes: int | None = None) -> int:
        """Write values, and return how many the store has deleted for them."""
        if max_bytes is None:
            self._store.update(values)
            return 0
        n_deleted: int = self._store.keep_recent(values, used, max_bytes)  # type: ignore[attr-defined]
        return n_deleted

    def _read(self, read: Callable[[], Any]) -> Any:
        """Return what a call of the store returns, or None if that fails or is not made."""
        started = self._clock()
        if not self._reading.is_over(started):
            return None
        try:
            found = read()
        except Exception as error:
            self._reading.begin(self._clock())
            self._fail(f"reading failed: {_say(error)}", type(error).__name__)
            return None
        self._notice_time("reading", self._reading, started, 1)
        return found

    def _write(self, write: Callable[[], int], n_values: int) -> int | None:
        """Return what a call of the store returns, or None if that fails or is not made."""
        started = self._clock()
        if not self._must_write and not self._writing.is_over(started):
            return None
        try:
            with store_errors(self._name, self._store):
                n_deleted = write()
        except KalmError as error:
            self._writing.begin(self._clock())
            if self._must_write:
                self._count(store_failures=1)
                raise
            self._fail(f"writing failed: {error}", type(error.__cause__ or error).__name__)
            return None
        self._notice_time("writing", self._writing, started, max(n_values, 1))
        return n_deleted

    def __getitem__(self, key: str) -> bytes:
        """Return a value; see `get`."""
        value: bytes | None = self.get(key)
        if value is None:
            raise KeyError(key)
        return value

    def __setitem__(self, key: str, value: bytes) -> None:
        """Write a value; see `update`."""
        self.update({key: value})

    def __delitem__(self, key: str) -> None:
        """Delete a value."""
        del self._store[key]

    def __iter__(self) -> Iterator[str]:
        """Go through the keys."""
        return iter(self._store)

    def __len__(self) -> int:
        """Return the number of values."""
        return len(self._store)

    def _notice_time(self, doing: str, pause: _Pause, started: float, n_values: int) -> None:
        """End a pause after a call that was answered; begin one if it was slow."""
        now = self._clock()
        if now - started <= SLOW_SECONDS * n_values:
            pause.end()
            return
        pause.begin(now)
        self._fail(f"{doing} took {now - started:.1f} s", f"{doing} is slow")

    def _fail(self, what: str, reason: str) -> None:
        self._count(store_failures=1)
        mark = object()
        if self._logged.setdefault(reason, mark) is mark:
            rule = "a query goes on without its %s: %s (logged once for a reason, counted in stats.store_failures)"
            logger.warning(rule, self._name, what)


class _Pause:
    """The time for which a store is left alone. Without a lock, which a fork could leave held: two calls may try at once."""

    def __init__(self) -> None:
        self._until: float | None = None

    def begin(self, now: float) -> None:
        self._until = now + PAUSE_SECONDS

    def end(self) -> None:
        self._until = None

    def is_over(self, now: float) -> bool:
        """Return whether the store may be called; after a pause one call may, and the others wait for what it finds."""
        until = self._until
        if until is None:
            return True
        if now < until:
            return False
        self.begin(now)
        return True


def guard(
    store: MutableMapping[str, bytes] | None, name: str, count: Callable[..., None], *, must_write: bool
) -> GuardedStore | None:
    """Return a store behind its guard, or None where there is none."""
    return None if store is None else GuardedStore(store, name, count, must_write=must_write)


@contextmanager
def store_errors(name: str, store: Mapping[str, bytes]) -> Iterator[None]:
    """Turn what a store raises into a `StoreError`."""
    try:
        yield
    except KalmError:
        raise
    except Exception as error:
        msg = f"the {name} cannot be used: {type(store).__name__} raised {_say(error)}; check that it runs and may be written"
        raise StoreError(msg) from error


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"
