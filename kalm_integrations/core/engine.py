"""The engine of a loaded model: requests queue, and one worker runs them in batches. What a batch does is the caller's affair.

* Queries go before bulk work; bulk work that has waited for `BULK_PATIENCE` seconds gets one batch all the same.
* A small request joins the batch of another one where it fits whole. A large one is cut into batches, between which anything
  may come in.
* A request comes before another one if its tag is lower: its own size plus the work that had been done when it came. So equal
  requests are served in order, a small one passes a large one, and nobody waits for more than its own size of later work
  (start-time fair queuing: Goyal, Vin and Cheng 1996).
* Whoever waits no longer takes back its request: what is left of it is not computed.
"""

from __future__ import annotations

import atexit
import bisect
import itertools
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from kalm_integrations.core.forks import ForkSafeLock, renew_in_child
from kalm_integrations.errors import EngineError, KalmError, OutOfMemoryError, PassError, QueueFullError

logger = logging.getLogger(__name__)

BULK_PATIENCE = 10.0
"""Seconds after which bulk work gets a batch while queries wait."""
MAX_MERGED = 256
"""Requests that are looked through for such as fit into a batch."""
SHUTDOWN_SECONDS = 60.0
"""How long a fork, and the end of the process, wait for the batch that is being computed."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Work(Generic[Item, Result]):
    """How items are computed, whosever they are."""

    run: Callable[[list[Item]], list[Result]]
    """Computes a batch. It runs on the engine's thread."""
    size: int
    """Items per batch."""
    group: Hashable = None
    """Requests whose work has the same group may share a batch; None: with nobody."""
    length: Callable[[Item], int] = lambda _: 0
    """An item's tokens, where a batch is bounded by them too."""
    max_tokens: int | None = None
    """Tokens per batch, padding included; an item that is longer makes a batch of its own."""

    def n_fitting(self, items: Sequence[Item], limit: int, n_before: int = 0, longest: int = 0) -> int:
        """Return how many of the first items fit into a batch that has `n_before` of at most `longest` tokens already."""
        n_fitting = 0
        for item in items:
            if n_before + n_fitting == limit:
                break
            longest = max(longest, self.length(item))
            n_items = n_before + n_fitting + 1
            if self.max_tokens is not None and n_items > 1 and n_items * longest > self.max_tokens:
                break
            n_fitting += 1
        return n_fitting


class Job(Future[list[Result]], Generic[Item, Result]):
    """A request: items, and in the end the result of each, in order. Cancelling it takes it out of the queue."""

    def __init__(
        self,
        work: Work[Item, Result],
        items: Sequence[Item],
        *,
        is_bulk: bool = False,
        report: Callable[[int], object] | None = None,
    ) -> None:
        """Make a request.

        Args:
            work: how items are computed.
            items: what to compute.
            is_bulk: nobody waits for it at a screen: queries go first.
            report: is told, on the engine's thread, how many items have been done since it was last called.
        """
        super().__init__()
        self.work = work
        self.is_bulk = is_bulk
        self.report = report
        self.pending = deque(items)
        self.results: list[Result] = []
        self.size = work.size
        """Items per batch; less than the work's after memory ran out."""
        self.is_alone = work.group is None
        """Whether it shares no batch (any more)."""
        self.seconds = 0.0
        """Computing time; of batches that were shared, by the share of the items."""
        self.n_threads = torch.get_num_threads()
        """As the caller's thread has set it, which torch keeps for each thread apart."""
        self.tag = 0
        self.queue: _Queue | None = None

    def cancel(self) -> bool:
        """Take the request back; see `concurrent.futures.Future.cancel`."""
        is_cancelled = super().cancel()
        if is_cancelled and self.queue is not None:
            self.queue.discard(self)
        return is_cancelled


AnyJob = Job[Any, Any]
Batch = list[tuple[AnyJob, list[Any]]]
"""Jobs, and which of their items are computed together."""


class Reservation(Protocol):
    """A request that is counted before it has jobs."""

    n_reserved: int
    """Items that are counted for it."""


class Engine:
    """Runs the jobs of all callers on one thread of its own, which starts with the first of them."""

    def __init__(self) -> None:
        """Make an engine without work."""
        self._start()
        renew_in_child(self._renew)

    def submit(self, job: AnyJob, max_queued: int | None = None) -> None:
        """Queue a job.

        Args:
            job: is answered through itself: it is a future.
            max_queued: items that may wait, of queries or of bulk work, with those of the job, unless it is the only one;
                None: any.

        Raises:
            QueueFullError: more would wait.
            EngineError: the process ends.
        """
        if job.pending:
            self._queue.add(job, max_queued)
        else:
            job.set_result([])

    def check_caller(self) -> None:
        """Check that it is not the engine's own thread that is about to wait for the engine.

        Raises:
            EngineError: it is.
        """
        if self._queue.is_own_thread:
            msg = "a store or a callback that a model calls must not ask the same model, but did; hand that to a thread"
            raise EngineError(msg)

    def reserve(self, request: Reservation, max_queued: int | None) -> None:
        """Count the items of a query whose jobs are not known yet, so that what waits stays bounded.

        Raises:
            QueueFullError: see `submit`.
            EngineError: see `submit`.
        """
        self._queue.reserve(request, max_queued)

    def release(self, request: Reservation) -> None:
        """Count the items of a query no longer: its job is counted instead, or it was taken back."""
        self._queue.release(request)

    def call(self, function: Callable[[], None]) -> None:
        """Have something done on the engine's thread, before the next batch is put together. It must raise nothing.

        Raises:
            EngineError: see `submit`.
        """
        self._queue.add_call(function)

    @property
    def n_queued(self) -> int:
        """Items that wait or are being computed: pairs of queries and passages, and passages to encode."""
        return sum(self._queue.n_items)

    @property
    def is_busy(self) -> bool:
        """Whether something waits or is being computed."""
        return self._queue.is_busy

    def _start(self) -> None:
        self._queue = _Queue()
        _queues.add(self._queue)
        # The worker knows the queue only, so that an engine, and its model, which nobody uses any more are released.
        self._closing = weakref.finalize(self, _Queue.close, self._queue)

    def _renew(self) -> None:
        """Begin anew in a child: the worker, and those who wait for the queued jobs, are in the parent."""
        self._closing.detach()
        _queues.discard(self._queue)
        self._start()


class _Queue:
    """Jobs that wait, of queries and of bulk work apart, in the order of their tags; and the thread that works them off."""

    def __init__(self) -> None:
        self.computing = ForkSafeLock(patience=SHUTDOWN_SECONDS)
        """Held while a batch is computed: a process forks between two batches, when no lock inside of torch is held."""
        self.n_items = [0, 0]
        """Items that wait, of queries and of bulk work."""
        self._changed = threading.Condition()
        self._jobs: tuple[list[AnyJob], list[AnyJob]] = ([], [])
        self._calls: list[Callable[[], None]] = []
        self._n_done = [0, 0]
        self._bulk_since = 0.0
        """When bulk work last got a batch, or began to wait."""
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def add(self, job: AnyJob, max_queued: int | None) -> None:
        kind, n_items = int(job.is_bulk), len(job.pending)
        with self._changed:
            self._check_open()
            self._check_room(kind, n_items, max_queued)
            job.queue, job.tag = self, self._n_done[kind] + n_items
            if job.is_bulk and not self._jobs[kind]:
                self._bulk_since = time.monotonic()
            self.n_items[kind] += n_items
            self._insert(job)
            self._wake()

    def reserve(self, request: Reservation, max_queued: int | None) -> None:
        with self._changed:
            self._check_open()
            self._check_room(0, request.n_reserved, max_queued)
            self.n_items[0] += request.n_reserved

    def release(self, request: Reservation) -> None:
        with self._changed:
            self.n_items[0] -= request.n_reserved
            request.n_reserved = 0

    def add_call(self, function: Callable[[], None]) -> None:
        with self._changed:
            self._check_open()
            self._calls.append(function)
            self._wake()

    @property
    def is_own_thread(self) -> bool:
        return threading.current_thread() is self._thread

    @property
    def is_busy(self) -> bool:
        return bool(any(self.n_items) or self._calls)

    def discard(self, job: AnyJob) -> None:
        """Take out a job, if it is still there."""
        with self._changed:
            self.n_items[job.is_bulk] -= len(job.pending)
            job.pending.clear()
            if job in self._jobs[job.is_bulk]:
                self._jobs[job.is_bulk].remove(job)

    def next_batch(self) -> Batch | None:
        """Wait for work and return the items to compute next, or None at the end."""
        with self._changed:
            while not self._is_closed and not any(self._jobs) and not self._calls:
                self._changed.wait()
            calls, self._calls = self._calls, []
        # Those that came meanwhile wait for a batch, which they must not put off for ever.
        while calls:
            calls.pop(0)()
        with self._changed:
            if self._is_closed:
                return None
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
        """Count the items of a batch as done."""
        with self._changed:
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
            _fail(job, error)

    def join(self, timeout: float) -> None:
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

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

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=_work_off, args=(self,), name="kalm-engine", daemon=True)
            self._thread.start()
        self._changed.notify()

    def _insert(self, job: AnyJob) -> None:
        bisect.insort(self._jobs[job.is_bulk], job, key=lambda other: other.tag)


def _work_off(queue: _Queue) -> None:
    """Compute batches until the queue is closed."""
    while True:
        batch: Batch | None = None
        try:
            batch = queue.next_batch()
            if batch is None:
                return
            with queue.computing:
                outcomes = _compute(queue, batch) if batch else []
        except BaseException as error:  # a fault of ours; without a worker everybody would wait for ever
            logger.exception("the engine failed, and with it all requests that waited")
            queue.fail(_own_error(error), batch)
            continue
        # Nothing of the batch is held while answers are given: who gets one may release the model.
        del batch
        while outcomes:
            _answer(*outcomes.pop())


def _compute(queue: _Queue, batch: Batch) -> list[tuple[AnyJob, BaseException | None]]:
    """Compute a batch and return the jobs that are done, or have failed with an error."""
    started = time.perf_counter()
    items = [item for _, part in batch for item in part]
    n_threads = batch[0][0].n_threads
    if torch.get_num_threads() != n_threads:
        torch.set_num_threads(n_threads)
    failure: BaseException | None = None
    try:
        with torch.inference_mode():
            results = iter(batch[0][0].work.run(items))
    except BaseException as error:  # whoever waits has to be told, whatever it is
        failure = error
    if failure is not None:
        # Out here, because inside `except` the traceback would still hold the tensors of the failed batch.
        return _recover(queue, batch, failure.with_traceback(None))
    seconds = (time.perf_counter() - started) / len(items)
    queue.settle(batch)
    for job, part in batch:
        job.results += itertools.islice(results, len(part))
        job.seconds += seconds * len(part)
        _report(job, len(part))
    return [(job, None) for job, _ in batch if not job.pending]


def _report(job: AnyJob, n_items: int) -> None:
    try:
        if job.report is not None:
            job.report(n_items)
    except Exception:  # a bar on a stream that is closed
        logger.debug("progress cannot be reported", exc_info=True)
        job.report = None


def _recover(queue: _Queue, batch: Batch, error: BaseException) -> list[tuple[AnyJob, BaseException | None]]:
    """Try again with half the items if memory ran out, or with each job alone, so that one's failure is not the others'."""
    n_items = sum(len(items) for _, items in batch)
    is_out_of_memory = _is_out_of_memory(error)
    if is_out_of_memory and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if is_out_of_memory and n_items > 1:
        logger.warning("out of memory with %d passages at a time; going on with %d", n_items, n_items // 2)

        def halve(job: AnyJob) -> None:
            job.size = max(1, min(job.size, n_items // 2))

        queue.put_back(batch, halve)
        return []
    if len(batch) > 1:

        def separate(job: AnyJob) -> None:
            job.is_alone = True

        queue.put_back(batch, separate)
        return []
    [(job, _)] = batch
    queue.settle(batch)
    queue.discard(job)
    return [(job, _own_error(error))]


def _own_error(error: BaseException) -> BaseException:
    """Return an error of ours for what came out of torch."""
    if isinstance(error, KalmError) or not isinstance(error, Exception):
        return error
    kind = OutOfMemoryError if _is_out_of_memory(error) else PassError
    remedy = "use a smaller model, dtype or max_passage_tokens" if kind is OutOfMemoryError else "see the cause"
    made = kind(f"a model must be able to compute one passage, but torch failed with {error!s:.500}; {remedy}")
    made.__cause__ = error
    return made


def _is_out_of_memory(error: BaseException) -> bool:
    # The CPU allocator raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _answer(job: AnyJob, error: BaseException | None) -> None:
    if error is not None:
        _fail(job, error)
    elif job.set_running_or_notify_cancel():
        job.set_result(job.results)


def _fail(job: AnyJob, error: BaseException) -> None:
    if job.set_running_or_notify_cancel():
        job.set_exception(error)


_queues: weakref.WeakSet[_Queue] = weakref.WeakSet()


@atexit.register
def _shut_down() -> None:
    """Stop between two batches, before the interpreter takes the ground from under the workers."""
    queues = list(_queues)
    for queue in queues:
        queue.close()
    deadline = time.monotonic() + SHUTDOWN_SECONDS
    for queue in queues:
        queue.join(max(0.0, deadline - time.monotonic()))
