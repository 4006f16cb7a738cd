"""What a request does, step by step, and who drives it: a thread that waits, or a coroutine that occupies none.

A flow is a generator. It yields jobs, gets their results, and returns the answer. What it does between its jobs (reading
encodings, tokenising, ordering) is done on the caller's thread, and for coroutines on one of a few threads. As soon as others
wait for the model, the model's own thread does it for light flows: Python computes on one thread at a time, and a model of
which every operator has to wait for its turn is slow.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeAlias, TypeVar

import torch

from kalm_integrations.core.engine import Engine
from kalm_integrations.core.fallback import too_late
from kalm_integrations.core.forks import renew_in_child
from kalm_integrations.core.jobs import AnyJob, fail
from kalm_integrations.errors import EngineError

N_THREADS = 4
"""Threads that do what coroutines ask for between their jobs."""

Answer = TypeVar("Answer")

Flow: TypeAlias = Generator[AnyJob, Any, Answer]


class Driver:
    """Drives flows through an engine."""

    def __init__(self, engine: Engine, max_queued: int) -> None:
        """Drive flows; `max_queued` is how many items may wait for a new request to be taken."""
        self._engine = engine
        self._max_queued = max_queued

    def run(self, flow: Flow[Answer], timeout: float | None = None, *, n_light: int | None = None) -> Answer:
        """Return a flow's answer; the thread waits.

        Args:
            flow: what to do.
            timeout: seconds; None waits as long as it takes.
            n_light: items of a light query: one that takes little time between its jobs, and waits for nobody there. Where
                others wait for the model, the model's own thread does that: threads that compute in Python beside it would
                slow it down. None: it is not light.

        Raises:
            DeadlineExceededError: it did not come in `timeout` seconds.
            QueueFullError: too much waits already.
        """
        self._engine.check_caller()
        deadline = None if timeout is None else time.monotonic() + timeout

        def wait(future: Future[Any]) -> Any:
            try:
                return future.result(None if deadline is None else max(0.0, deadline - time.monotonic()))
            except FutureTimeoutError as error:
                if future.done() and not future.cancelled() and future.exception() is error:
                    raise
                raise too_late(timeout) from error
            finally:
                # Whatever ended the wait, be it Ctrl-C: nobody wants the rest.
                future.cancel()

        if n_light is not None and self._engine.is_busy:
            answer: Answer = wait(self._start(flow, n_light))
            return answer
        max_queued: int | None = self._max_queued
        job, answer = call_plainly(lambda: _advance(flow, None))
        while job is not None:
            job.n_threads = torch.get_num_threads()
            self._engine.submit(job, max_queued)
            max_queued = None
            result = wait(job)
            job, answer = call_plainly(lambda result=result: _advance(flow, result))  # type: ignore[misc]
        return answer

    async def arun(self, flow: Flow[Answer], timeout: float | None = None, *, n_light: int | None = None) -> Answer:
        """Do what `run` does; no thread waits, and a coroutine that is cancelled takes its jobs out of the queue."""
        if n_light is None:
            answering: asyncio.Future[Answer] = asyncio.ensure_future(self._arun(flow))
        else:
            answering = asyncio.wrap_future(self._start(flow, n_light))
        try:
            return await asyncio.wait_for(answering, timeout)
        except asyncio.TimeoutError as error:
            if not answering.cancelled():
                raise  # an error of the flow's own
            raise too_late(timeout) from error

    def _start(self, flow: Flow[Answer], n_items: int) -> Future[Answer]:
        """Have a light flow driven by the engine's thread."""
        request: _Request[Answer] = _Request(self._engine, flow, n_items, self._max_queued)
        self._engine.reserve(request, self._max_queued)
        self._engine.call(request.advance)
        return request

    async def _arun(self, flow: Flow[Answer]) -> Answer:
        max_queued: int | None = self._max_queued
        answer: Answer
        job, answer = await call_aside(lambda: _advance(flow, None))
        while job is not None:
            job.n_threads = torch.get_num_threads()
            self._engine.submit(job, max_queued)
            max_queued = None
            result = await asyncio.wrap_future(job)
            job, answer = await call_aside(lambda result=result: _advance(flow, result))  # type: ignore[misc]
        return answer


class _Request(Future[Answer]):
    """The answer of a flow that the engine's thread drives. Cancelling it takes its job out of the queue."""

    def __init__(self, engine: Engine, flow: Flow[Answer], n_items: int, max_queued: int) -> None:
        super().__init__()
        self.n_reserved = n_items
        self._max_queued = max_queued
        self._engine = engine
        self._flow = flow
        self._job: AnyJob | None = None
        self._n_threads = torch.get_num_threads()

    def cancel(self) -> bool:
        """See `concurrent.futures.Future.cancel`."""
        is_cancelled = super().cancel()
        if is_cancelled:
            self._engine.release(self)
            if self._job is not None:
                self._job.cancel()
        return is_cancelled

    def advance(self) -> None:
        """Go on to the next job, or to the answer."""
        job, self._job = self._job, None
        try:
            if self.cancelled():
                return
            next_job, answer = _advance(self._flow, None if job is None else job.result())
            # Passages may have more windows than were counted.
            is_larger = job is None and next_job is not None and len(next_job.pending) > self.n_reserved
            self._engine.release(self)
            if next_job is not None:
                self._job = next_job
                next_job.n_threads = self._n_threads
                self._engine.submit(next_job, self._max_queued if is_larger else None)
                next_job.add_done_callback(self._resume)
                if self.cancelled():
                    next_job.cancel()
                return
        except BaseException as error:  # whoever waits has to be told, whatever it is
            self._engine.release(self)
            fail(self, error)
            return
        if self.set_running_or_notify_cancel():
            self.set_result(answer)

    def _resume(self, job: Future[Any]) -> None:
        if job.cancelled():
            return
        try:
            self._engine.call(self.advance)
        except EngineError as error:
            fail(self, error)


def call_plainly(function: Callable[[], Answer]) -> Answer:
    """Call a function in torch's plain state: here, or on another thread if this one's is not plain."""
    return function() if _is_plain() else _threads.submit(function).result()


async def call_aside(function: Callable[[], Answer]) -> Answer:
    """Call a function on one of a few threads, so that the event loop goes on."""
    return await asyncio.wrap_future(_threads.submit(function))


class _Threads:
    """A pool of threads, made when it is first needed, and anew in a child process, which has none of them."""

    def __init__(self) -> None:
        self.is_child = False
        self._pool = self._make()
        renew_in_child(self._renew)

    def submit(self, function: Callable[[], Answer]) -> Future[Answer]:
        return self._pool.submit(function)

    def _renew(self) -> None:
        self.is_child = True
        self._pool = self._make()

    @staticmethod
    def _make() -> ThreadPoolExecutor:
        return ThreadPoolExecutor(N_THREADS, thread_name_prefix="kalm-callers")


_threads = _Threads()


def _is_plain() -> bool:
    """Return whether torch computes on this thread as on a new one.

    It does not under autocast, inference mode or a default device. In a child process torch may not compute on the thread that
    was forked at all: OpenMP's threads for it are in the parent.
    """
    return not (
        _threads.is_child
        or torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
        or torch.is_inference_mode_enabled()
        # Up to torch 2.6 `get_default_device` does not know the device that a `with` has set.
        or torch.empty(0).device.type != "cpu"
    )


def _advance(flow: Flow[Answer], result: Any) -> tuple[AnyJob | None, Any]:
    """Return a flow's next job, or None and its answer."""
    try:
        return flow.send(result), None
    except StopIteration as end:
        return None, end.value
