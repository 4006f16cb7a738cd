"""The order in which a model's work is done: which jobs wait, which go next, and which go together."""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Callable

from kalm_integrations.core.jobs import AnyJob, Batch, Reservation, fail
from kalm_integrations.errors import EngineError, QueueFullError

BULK_PATIENCE = 10.0
"""Seconds after which bulk work gets a batch while queries wait."""
MAX_MERGED = 256
"""Requests that are looked through for such as fit into a batch."""


class JobQueue:
    """Jobs that wait, of queries and of bulk work apart, in the order of their tags. Safe to use from any thread."""

    def __init__(self) -> None:
        """Make an empty queue."""
        self.n_items = [0, 0]
        """Items that wait, of queries and of bulk work."""
        self.n_batches = 0
        """Batches whose items were counted as done."""
        self._changed = threading.Condition()
        self._jobs: tuple[list[AnyJob], list[AnyJob]] = ([], [])
        self._calls: list[Callable[[], None]] = []
        self._n_done = [0, 0]
        self._bulk_since = 0.0
        """When bulk work last got a batch, or began to wait."""
        self._is_closed = False

    def add(self, job: AnyJob, max_queued: int | None) -> None:
        """Let a job wait; see `Engine.submit`."""
        kind, n_items = int(job.is_bulk), len(job.pending)
        with self._changed:
            self._check_open()
            self._check_room(kind, n_items, max_queued)
            job.queue, job.tag = self, self._n_done[kind] + n_items
            if job.is_bulk and not self._jobs[kind]:
                self._bulk_since = time.monotonic()
            self.n_items[kind] += n_items
            self._insert(job)
            self._changed.notify()

    def reserve(self, request: Reservation, max_queued: int | None) -> None:
        """Count the items of a query whose jobs are not known yet; see `Engine.reserve`."""
        with self._changed:
            self._check_open()
            self._check_room(0, request.n_reserved, max_queued)
            self.n_items[0] += request.n_reserved

    def release(self, request: Reservation) -> None:
        """Count them no longer."""
        with self._changed:
            self.n_items[0] -= request.n_reserved
            request.n_reserved = 0

    def add_call(self, function: Callable[[], None]) -> None:
        """Let something wait that is to be called before the next batch; see `Engine.call`."""
        with self._changed:
            self._check_open()
            self._calls.append(function)
            self._changed.notify()

    @property
    def is_busy(self) -> bool:
        """Whether something waits or is being computed."""
        return bool(any(self.n_items) or self._calls)

    def discard(self, job: AnyJob) -> None:
        """Take out a job, if it is still there."""
        with self._changed:
            self.n_items[job.is_bulk] -= len(job.pending)
            job.pending.clear()
            if job in self._jobs[job.is_bulk]:
                self._jobs[job.is_bulk].remove(job)

    def next_calls(self) -> list[Callable[[], None]] | None:
        """Wait for work and return what is to be called before the next batch, or None at the end.

        What comes meanwhile waits for a batch, which it must not put off for ever.
        """
        with self._changed:
            while not self._is_closed and not any(self._jobs) and not self._calls:
                self._changed.wait()
            if self._is_closed:
                return None
            calls, self._calls = self._calls, []
            return calls

    def next_batch(self) -> Batch:
        """Return the items to compute next; none if nothing waits."""
        with self._changed:
            if not any(self._jobs):
                return []
            queries, bulk = self._jobs
            now = time.monotonic()
            jobs = bulk if not queries or (bulk and now - self._bulk_since > BULK_PATIENCE) else queries
            if jobs is bulk:
                self._bulk_since = now
            return self._take(jobs)

    def _take(self, jobs: list[AnyJob]) -> Batch:
        head, others = jobs[0], jobs[1:MAX_MERGED]
        work = head.work
        n_items = work.n_fitting(head.pending, head.size)
        batch = [(head, [head.pending.popleft() for _ in range(n_items)])]
        longest = max(map(work.length, batch[0][1]))
        others = [job for job in others if job.work.group == work.group and not job.is_alone and not head.is_alone]
        # Of like lengths, so that little is padded.
        for job in sorted(others, key=lambda job: abs(work.length(job.pending[0]) - longest)):
            room = min(head.size, job.size)
            if n_items + len(job.pending) > room:
                continue
            if work.n_fitting(job.pending, room, n_items, longest) == len(job.pending):
                batch.append((job, list(job.pending)))
                n_items += len(job.pending)
                longest = max(longest, *map(work.length, job.pending))
                job.pending.clear()
        for job, _ in batch:
            if not job.pending:
                jobs.remove(job)
        return batch

    def put_back(self, batch: Batch, change: Callable[[AnyJob], None]) -> None:
        """Queue the items of a batch again, ahead of the rest of their jobs, which are changed."""
        with self._changed:
            for job, items in batch:
                change(job)
                if job.cancelled():
                    self.n_items[job.is_bulk] -= len(items)
                    continue
                is_queued = bool(job.pending)
                job.pending.extendleft(reversed(items))
                if not is_queued:
                    self._insert(job)

    def settle(self, batch: Batch) -> None:
        """Count a batch and its items as done."""
        with self._changed:
            self.n_batches += 1
            for job, items in batch:
                self.n_items[job.is_bulk] -= len(items)
                self._n_done[job.is_bulk] += len(items)

    def close(self) -> None:
        """Refuse what waits, and let the worker end after the batch that it computes."""
        with self._changed:
            self._is_closed = True
            calls, self._calls = self._calls, []
            self._changed.notify_all()
        # They find that they can have no job any more.
        for call in calls:
            call()
        self.fail(EngineError("a model answers until its process ends, but it ended before this request's turn"))

    def fail(self, error: BaseException, batch: Batch | None = None) -> None:
        """Answer all jobs that wait, and those of a batch, with an error."""
        with self._changed:
            failed = {job for jobs in self._jobs for job in jobs} | {job for job, _ in batch or ()}
            self.n_items = [0, 0]
            for jobs in self._jobs:
                jobs.clear()
        for job in failed:
            fail(job, error)

    def _check_open(self) -> None:
        if self._is_closed:
            msg = "a model can be asked until its process ends, but it ends now; ask earlier"
            raise EngineError(msg)

    def _check_room(self, kind: int, n_items: int, max_queued: int | None) -> None:
        n_queued = self.n_items[kind]
        if max_queued is not None and n_queued and n_queued + n_items > max_queued:
            msg = (
                f"at most max_queued_pairs={max_queued} may wait for a model, but {n_queued} wait and {n_items} more were "
                "asked for; try again later, ask for fewer candidates, or raise max_queued_pairs"
            )
            raise QueueFullError(msg)

    def _insert(self, job: AnyJob) -> None:
        bisect.insort(self._jobs[job.is_bulk], job, key=lambda other: other.tag)
