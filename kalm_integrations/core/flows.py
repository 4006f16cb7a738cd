"""What a request does, step by step, and who drives it: a thread that waits, or a coroutine that occupies none.

A flow is a generator. It yields jobs, gets their results, and returns the answer. What it does between its jobs (reading
encodings, tokenising, ordering) is done on the caller's thread; for coroutines on one of a few threads that nobody waits on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeAlias, TypeVar

import torch

from kalm_integrations.core.engine import AnyJob, Engine
from kalm_integrations.core.fallback import too_late
from kalm_integrations.core.forks import renew_in_child

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

    def run(self, flow: Flow[Answer], timeout: float | None = None) -> Answer:
        """Return a flow's answer; the thread waits.

        Raises:
            DeadlineExceededError: it did not come in `timeout` seconds.
            QueueFullError: too much waits already.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        max_queued: int | None = self._max_queued
        answer: Answer
        job, answer = call_plainly(lambda: _advance(flow, None))
        while job is not None:
            self._engine.submit(job, max_queued)
            try:
                result = job.result(None if deadline is None else max(0.0, deadline - time.monotonic()))
            except FutureTimeoutError as error:
                if job.done():
                    raise  # an error of the job's own
                raise too_late(timeout) from error
            finally:
                # Whatever ended the wait, be it Ctrl-C: nobody wants the rest.
                job.cancel()
            max_queued = None
            job, answer = call_plainly(lambda result=result: _advance(flow, result))  # type: ignore[misc]
        return answer

    async def arun(self, flow: Flow[Answer], timeout: float | None = None) -> Answer:
        """Return a flow's answer; no thread waits, and a coroutine that is cancelled takes its job out of the queue.

        Raises:
            DeadlineExceededError: it did not come in `timeout` seconds.
            QueueFullError: too much waits already.
        """
        if timeout is None:
            return await self._arun(flow)
        task = asyncio.ensure_future(self._arun(flow))
        try:
            return await asyncio.wait_for(task, timeout)
        except asyncio.TimeoutError as error:
            if not task.cancelled():
                raise  # an error of the flow's own
            raise too_late(timeout) from error

    async def _arun(self, flow: Flow[Answer]) -> Answer:
        max_queued: int | None = self._max_queued
        answer: Answer
        job, answer = await call_aside(lambda: _advance(flow, None))
        while job is not None:
            self._engine.submit(job, max_queued)
            max_queued = None
            result = await asyncio.wrap_future(job)
            job, answer = await call_aside(lambda result=result: _advance(flow, result))  # type: ignore[misc]
        return answer


def call_plainly(function: Callable[[], Answer]) -> Answer:
    """Call a function in torch's plain state: here, or on another thread if this one's is not plain."""
    return function() if _is_plain() else _threads.submit(function).result()


async def call_aside(function: Callable[[], Answer]) -> Answer:
    """Call a function on one of a few threads, so that the event loop goes on."""
    return await asyncio.wrap_future(_threads.submit(function))


class _Threads:
    """A pool of threads, made when it is first needed, and anew in a child process, which has none of them."""

    def __init__(self) -> None:
        self._renew()
        self.is_child = False
        renew_in_child(self._renew)

    def submit(self, function: Callable[[], Answer]) -> Future[Answer]:
        return self._pool.submit(function)

    def _renew(self) -> None:
        self.is_child = True
        self._pool = ThreadPoolExecutor(N_THREADS, thread_name_prefix="kalm-callers")


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
        or torch.get_default_device().type != "cpu"
    )


def _advance(flow: Flow[Answer], result: Any) -> tuple[AnyJob | None, Any]:
    """Return a flow's next job, or None and its answer."""
    try:
        return flow.send(result), None
    except StopIteration as end:
        return None, end.value
