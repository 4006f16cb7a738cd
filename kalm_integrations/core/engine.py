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
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable

import torch

from kalm_integrations.core.forks import ForkSafeLock, renew_in_child
from kalm_integrations.core.jobs import AnyJob, Batch, Reservation, fail
from kalm_integrations.core.queueing import JobQueue
from kalm_integrations.errors import EngineError, KalmError, OutOfMemoryError, PassError

logger = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 60.0
"""How long a fork, and the end of the process, wait for the batch that is being computed."""


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
            self._worker.queue.add(job, max_queued)
            self._worker.start()
        else:
            job.set_result([])

    def check_caller(self) -> None:
        """Check that it is not the engine's own thread that is about to wait for the engine.

        Raises:
            EngineError: it is.
        """
        if self._worker.is_current:
            msg = "a store or a callback that a model calls must not ask the same model, but did; hand that to a thread"
            raise EngineError(msg)

    def reserve(self, request: Reservation, max_queued: int | None) -> None:
        """Count the items of a query whose jobs are not known yet, so that what waits stays bounded.

        Raises:
            QueueFullError: see `submit`.
            EngineError: see `submit`.
        """
        self._worker.queue.reserve(request, max_queued)

    def release(self, request: Reservation) -> None:
        """Count the items of a query no longer: its job is counted instead, or it was taken back."""
        self._worker.queue.release(request)

    def call(self, function: Callable[[], None]) -> None:
        """Have something done on the engine's thread, before the next batch is put together. It must raise nothing.

        Raises:
            EngineError: see `submit`.
        """
        self._worker.queue.add_call(function)
        self._worker.start()

    @property
    def n_queued(self) -> int:
        """Items that wait or are being computed: pairs of queries and passages, and passages to encode."""
        return sum(self._worker.queue.n_items)

    @property
    def n_batches(self) -> int:
        """Batches that have been computed."""
        return self._worker.queue.n_batches

    @property
    def is_busy(self) -> bool:
        """Whether something waits or is being computed."""
        return self._worker.queue.is_busy

    def _start(self) -> None:
        self._worker = _Worker()
        _workers.add(self._worker)
        # The worker does not know the engine, so that an engine, and its model, which nobody uses any more are released.
        self._closing = weakref.finalize(self, JobQueue.close, self._worker.queue)

    def _renew(self) -> None:
        """Begin anew in a child: the worker, and those who wait for the queued jobs, are in the parent."""
        self._closing.detach()
        _workers.discard(self._worker)
        self._start()


class _Worker:
    """A queue, and the thread that works it off."""

    def __init__(self) -> None:
        self.queue = JobQueue()
        self.computing = ForkSafeLock(patience=SHUTDOWN_SECONDS)
        """Held while something is computed: a process forks in between, when no lock inside of torch is held."""
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    @property
    def is_current(self) -> bool:
        """Whether it is the worker that asks."""
        return threading.current_thread() is self._thread

    def start(self) -> None:
        """Start the thread, if it has not been."""
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    self._thread = threading.Thread(target=_work_off, args=(self.queue, self.computing), daemon=True)
                    self._thread.name = "kalm-engine"
                    self._thread.start()

    def join(self, timeout: float) -> None:
        """Wait for the thread's end."""
        if self._thread is not None and not self.is_current:
            self._thread.join(timeout)


def _work_off(queue: JobQueue, computing: ForkSafeLock) -> None:
    """Compute batches until the queue is closed."""
    while True:
        batch: Batch = []
        try:
            calls = queue.next_calls()
            if calls is None:
                return
            with computing:
                while calls:
                    calls.pop(0)()
                batch = queue.next_batch()
                outcomes = _compute(queue, batch) if batch else []
        except BaseException as error:  # a fault of ours; without a worker everybody would wait for ever
            logger.exception("the engine failed, and with it all requests that waited")
            queue.fail(_own_error(error), batch)
            continue
        # Nothing of the batch is held while answers are given: who gets one may release the model.
        del batch
        while outcomes:
            _answer(*outcomes.pop())


def _compute(queue: JobQueue, batch: Batch) -> list[tuple[AnyJob, BaseException | None]]:
    """Compute a batch and return the jobs that are done, or have failed with an error."""
    started = time.perf_counter()
    items = [item for _, part in batch for item in part]
    n_threads = batch[0][0].n_threads
    if n_threads is not None and torch.get_num_threads() != n_threads:
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


def _recover(queue: JobQueue, batch: Batch, error: BaseException) -> list[tuple[AnyJob, BaseException | None]]:
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
        fail(job, error)
    elif job.set_running_or_notify_cancel():
        job.set_result(job.results)


_workers: weakref.WeakSet[_Worker] = weakref.WeakSet()


@atexit.register
def _shut_down() -> None:
    """Stop between two batches, before the interpreter takes the ground from under the workers."""
    workers = list(_workers)
    for worker in workers:
        worker.queue.close()
    deadline = time.monotonic() + SHUTDOWN_SECONDS
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
