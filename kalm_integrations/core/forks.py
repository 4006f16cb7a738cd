"""Locks in a process that forks: what another thread held would be held for ever in the child.

So the thread that forks waits until nobody holds a lock, and what the locks guard is whole in the child, too. It does not wait
for ever: in the child every lock is renewed in any case.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class kept_property(Generic[Value]):  # noqa: N801  as functools calls its own
    """A property that is computed when it is first asked for; two threads may both compute it.

    `functools.cached_property` holds a lock meanwhile until Python 3.12, one for all objects, which a child may find held.
    """

    def __init__(self, function: Callable[[Any], Value]) -> None:
        """Take what computes it."""
        self._function = function
        self.__doc__ = function.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        """Learn under which name an object keeps it."""
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Value:
        """Compute it; the next time it is found in the object itself."""
        value = instance.__dict__[self._name] = self._function(instance)
        return value


class ForkSafeLock:
    """A re-entrant lock that a child process finds free."""

    def __init__(self, patience: float = 1.0) -> None:
        """Make a lock that nobody holds.

        Args:
            patience: seconds that a fork waits for who holds it. Those for whom it waits longest are waited for first: they
                may need the others to get on.
        """
        self.patience = patience
        self._lock = threading.RLock()
        with _known_lock:
            _locks.add(self)

    def __enter__(self) -> None:
        """Wait for the lock and hold it."""
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        """Let it go."""
        self._lock.release()

    def acquire(self, timeout: float) -> bool:
        """Hold the lock if it comes free in time, and return whether it did."""
        return self._lock.acquire(timeout=timeout)

    def renew(self) -> None:
        """Be free, whoever held it."""
        self._lock = threading.RLock()


def renew_in_child(renew: Callable[[], object]) -> None:
    """Have a bound method called in every child, as long as its object lives, once all locks are free."""
    with _known_lock:
        # Those whose objects are gone go too, or a process that opens many models would keep one for each.
        _renewed[:] = [*(method for method in _renewed if method() is not None), weakref.WeakMethod(renew)]


_known_lock = threading.Lock()
_locks: weakref.WeakSet[ForkSafeLock] = weakref.WeakSet()
_renewed: list[weakref.WeakMethod[Callable[[], object]]] = []
_held: list[ForkSafeLock] = []


def _before() -> None:
    # Released in both processes.
    _known_lock.acquire()
    started = time.monotonic()
    longest_first = sorted(_locks, key=lambda lock: -lock.patience)
    _held.extend(lock for lock in longest_first if lock.acquire(max(0.0, started + lock.patience - time.monotonic())))


def _in_parent() -> None:
    while _held:
        _held.pop().__exit__()
    _known_lock.release()


def _in_child() -> None:
    _held.clear()
    for lock in _locks:
        lock.renew()
    _known_lock.release()
    for method in list(_renewed):
        renew = method()
        if renew is None:
            _renewed.remove(method)
        else:
            renew()


# Windows cannot fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
