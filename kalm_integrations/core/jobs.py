"""Requests to a model: what is to be computed, for whom, and how it is computed, whosever it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

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


def in_passages(report: Callable[[int], object], n_items: int, n_passages: int) -> Callable[[int], object]:
    """Return what a job tells of its items, of which a passage may have several, and what tells of passages in turn."""
    done = 0

    def tell(n: int) -> None:
        nonlocal done
        before, done = done, done + n
        report(done * n_passages // n_items - before * n_passages // n_items)

    return tell


class Canceller(Protocol):
    """Where a job waits."""

    def discard(self, job: Job[Any, Any]) -> None:
        """Take out a job, if it is still there."""


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
        self.n_threads: int | None = None
        """Of torch, as the caller's thread has set it: torch keeps it for each thread apart. None leaves it as it is."""
        self.tag = 0
        self.queue: Canceller | None = None

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


def fail(answer: Future[Any], error: BaseException) -> None:
    """Answer with an error, unless nobody waits any more."""
    if answer.set_running_or_notify_cancel():
        answer.set_exception(error)
