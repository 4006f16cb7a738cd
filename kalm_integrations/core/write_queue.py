"""Writes after the answer: what queries had to encode goes to stores in the background, one write after the other.

So a store sees one write at a time, in the order of the queries. A store that fails is logged, and one that hangs is left
alone after a while: a lost encoding costs time, never a result. Nothing here holds up a query or the end of the process for
long.
"""

from __future__ import annotations

import atexit
import contextvars
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kalm_integrations.core.forks import renew_in_child
from kalm_integrations.errors import SettingsError

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 30.0
"""A write that takes longer is given up: its thread is left to itself, and the next writes get another one."""
EXIT_SECONDS = 10.0
"""How long the end of the process waits for what is not written yet."""
MAX_WAITING_DOCUMENTS = 2000
"""Documents that may wait; each holds its states in memory. What comes beyond is dropped, and encoded by a later query."""

_N_THREADS = 2  # one writes, the other looks at the clock


@dataclass(frozen=True)
class WriteBackStats:
    """What has become of documents that were handed over in this process, in documents."""

    n_waiting: int = 0
    """Not written yet; those that are being written included."""
    n_done: int = 0
    """Taken by `write_back` or the store. Documents that a store passed over are in the log."""
    n_failed: int = 0
    """Their write raised an error, which is in the log."""
    n_dropped: int = 0
    """Not written, because too many waited or their store hung."""


@dataclass(frozen=True, eq=False)
class _Task:
    number: int
    target: object
    n_documents: int
    work: Callable[[], object]


class WriteQueue:
    """Tasks that are worked off in order, by threads that hold nobody up."""

    def __init__(self) -> None:
        """Make an empty queue; a forked child begins with an empty one, too."""
        self._is_registered = False
        self.renew()
        renew_in_child(self.renew)

    def renew(self) -> None:
        """Begin with nothing: a forked child has none of the threads, and what waited is written by its parent."""
        self._changed = threading.Condition()
        self._n_threads = 0
        self._n_added = 0
        self._waiting: deque[_Task] = deque()
        self._running: _Task | None = None
        self._deadline = 0.0
        # By identity of the target, which the task keeps alive.
        self._given_up: dict[int, _Task] = {}
        self._is_dropping = False
        self._n_done = self._n_failed = self._n_dropped = 0

    def add(self, target: object, n_documents: int, work: Callable[[], object]) -> bool:
        """Let a write be done in the background, after those that were added before.

        It is dropped, counted and logged, if too many documents wait or an earlier write to the same target hangs.

        Args:
            target: what is written to; while one write to it hangs it gets no other.
            n_documents: how many documents it is about.
            work: writes them. What it raises is logged.

        Returns:
            Whether it will be done.
        """
        with self._changed:
            reason = self._reason_to_drop(target, n_documents)
            is_news = bool(reason) and not self._is_dropping
            self._is_dropping = bool(reason)
            if reason:
                self._n_dropped += n_documents
            else:
                self._n_added += 1
                self._waiting.append(_Task(self._n_added, target, n_documents, work))
                self._changed.notify_all()
        if is_news:
            rule = "the encodings of %d documents are not written back, nor those of the next queries: %s"
            logger.warning(rule, n_documents, reason)
        return not reason

    def wait(self, timeout: float | None) -> bool:
        """Wait until all that was added before is over.

        Args:
            timeout: seconds to wait at most; None waits until all is over.

        Returns:
            Whether it was over in time.

        Raises:
            SettingsError: `timeout` is no number of seconds.
        """
        is_number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
        if timeout is not None and not (is_number and timeout >= 0):
            msg = f"timeout must be a number of seconds or None, but got {timeout!r}"
            raise SettingsError(msg)
        with self._changed:
            last = self._n_added
            return self._changed.wait_for(lambda: self._first_open() > last, timeout)

    def stats(self) -> WriteBackStats:
        """Return the counters."""
        with self._changed:
            return WriteBackStats(self._count_waiting(), self._n_done, self._n_failed, self._n_dropped)

    def close(self) -> None:
        """Wait at the end of the process, not for long, and drop the rest."""
        if self.wait(EXIT_SECONDS):
            return
        with self._changed:
            n_lost = self._count_waiting()
            self._waiting.clear()
        rule = "the process ends before the encodings of %d documents are written back: their store took more than %g seconds"
        logger.warning(rule, n_lost, EXIT_SECONDS)

    def _reason_to_drop(self, target: object, n_documents: int) -> str | None:
        if id(target) in self._given_up:
            return "an earlier write to the same place has not ended yet"
        # A query with more than that is taken when nothing else waits.
        if self._waiting and self._count_waiting() + n_documents > MAX_WAITING_DOCUMENTS:
            return f"more than {MAX_WAITING_DOCUMENTS} wait already, because stores are slower than queries"
        if not self._start():
            return "no thread can be started"
        return None

    def _start(self) -> bool:
        """Start the threads that are missing, and return whether there is one."""
        if not self._is_registered:
            self._is_registered = True
            # Now, not on import: what is registered later is called earlier, and stores register their own ends.
            atexit.register(self.close)
        while self._n_threads < _N_THREADS:
            try:
                threading.Thread(target=self._work, name="kalm-write-back", daemon=True).start()
            except RuntimeError:  # the process ends, or may have no more threads
                break
            self._n_threads += 1
        return self._n_threads > 0

    def _work(self) -> None:
        while True:
            task = self._next()
            is_failed = False
            try:
                # Not in the caller's context: its callbacks and spans are of a query that is over.
                contextvars.Context().run(task.work)
            except BaseException:
                is_failed = True
                logger.exception("could not write back the encodings of %d documents; the query is answered", task.n_documents)
            if not self._finish(task, is_failed=is_failed):
                logger.warning("a write that was given up has ended; write-backs to the same place are taken again")
                return
            # A store shall not live on because its last task does.
            del task

    def _next(self) -> _Task:
        """Return the task whose turn it is; meanwhile give up the one that is being worked on when it takes too long."""
        while True:
            with self._changed:
                if self._running is None and self._waiting:
                    self._running = task = self._waiting.popleft()
                    self._deadline = time.monotonic() + TIMEOUT_SECONDS
                    self._changed.notify_all()
                    return task
                left = None if self._running is None else self._deadline - time.monotonic()
                if left is None or left > 0:
                    self._changed.wait(left)
                    continue
                late, n_dropped = self._give_up()
            rule = (
                "writing back the encodings of %d documents takes more than %g seconds: it is given up, and with it those of "
                "%d documents for the same place, which gets no more until that write ends"
            )
            logger.warning(rule, late, TIMEOUT_SECONDS, n_dropped)

    def _give_up(self) -> tuple[int, int]:
        """Leave the running task to its thread, and return how many documents it has, and how many waited for its target."""
        late = self._running
        assert late is not None
        self._running = None
        self._given_up[id(late.target)] = late
        dropped = [task for task in self._waiting if task.target is late.target]
        self._waiting = deque(task for task in self._waiting if task.target is not late.target)
        n_dropped = sum(task.n_documents for task in dropped)
        self._n_dropped += late.n_documents + n_dropped
        self._n_threads -= 1
        self._start()
        self._changed.notify_all()
        return late.n_documents, n_dropped

    def _finish(self, task: _Task, *, is_failed: bool) -> bool:
        """Count a task that is over, and return whether its thread goes on: not if it was given up, for another has begun."""
        with self._changed:
            if self._running is not task:
                self._given_up.pop(id(task.target), None)
                return False
            if is_failed:
                self._n_failed += task.n_documents
            else:
                self._n_done += task.n_documents
            self._running = None
            self._changed.notify_all()
            return True

    def _first_open(self) -> float:
        """Return the number of the first task that is not over."""
        first = self._running or (self._waiting[0] if self._waiting else None)
        return float("inf") if first is None else first.number

    def _count_waiting(self) -> int:
        running = [] if self._running is None else [self._running]
        return sum(task.n_documents for task in (*running, *self._waiting))
