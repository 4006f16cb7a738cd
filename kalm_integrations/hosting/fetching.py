"""Encodings fetched for a query: those that its documents came without, that memory has not, and that a store may have.

The mirror image of write-back, for searches that leave the long strings out. All that is missing is asked for in one call,
before anything is encoded. What a store answers is believed no more than any metadata, and what it does not answer in time is
encoded: it costs time, never a result.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeAlias, TypeVar

from kalm_integrations.core.base import Reranker
from kalm_integrations.core.types import Passage, Reading, iterator_of

logger = logging.getLogger(__name__)

FETCH_SECONDS = 5.0
"""How long a query waits for a store; with a time-out, half of the time that is left if that is shorter."""
PAUSE_SECONDS = 30.0
"""How long a store that failed or was late is left alone, so that a dead server costs one wait and not one for each query."""

Doc = TypeVar("Doc")

Fetch: TypeAlias = Callable[[Sequence[Any]], Sequence[Any]]
"""Takes documents that came without encodings, and returns for each what the store has under `kalm_encoding`, or None."""


@dataclass(frozen=True)
class _Answer:
    values: list[Any]
    problem: str = ""
    kind: str = ""
    """Of the problem; each is logged once."""


class Fetcher(Generic[Doc]):
    """A store that is asked for encodings, and through which no query fails. A copy is itself."""

    def __init__(self, fetch: Fetch) -> None:
        """Ask by a function."""
        self.fetch = fetch
        self.origin = object()
        """Of what it fetches, see `Passage.origin`."""
        self._late: threading.Thread | None = None
        self._pause_ends = 0.0
        self._logged: set[str] = set()

    def ask(self, documents: Sequence[Doc], seconds: float) -> list[Any]:
        """Return what the store has for documents, in order; nothing but None if it fails or takes longer."""
        call, thread = self._begin(documents)
        concurrent.futures.wait([call], seconds)
        return self._end(call, thread, len(documents))

    async def aask(self, documents: Sequence[Doc], seconds: float) -> list[Any]:
        """Do what `ask` does, while the event loop goes on."""
        call, thread = self._begin(documents)
        await asyncio.wait([asyncio.wrap_future(call)], timeout=seconds)
        return self._end(call, thread, len(documents))

    def _begin(self, documents: Sequence[Doc]) -> tuple[Future[_Answer], threading.Thread | None]:
        """Start a call on a thread of its own, which may hang without anybody waiting for it, not even the process's end."""
        call: Future[_Answer] = Future()
        call.set_running_or_notify_cancel()
        # A thread that is late in a parent process is none in its child.
        is_late = self._late is not None and self._late.is_alive()
        if is_late or time.monotonic() < self._pause_ends:
            call.set_result(_Answer([None] * len(documents)))
            return call, None
        context = contextvars.copy_context()

        def work() -> None:
            call.set_result(context.run(_answer, self.fetch, documents))

        thread = threading.Thread(target=work, name="kalm-fetch", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the process ends, or may have no more threads
            call.set_result(_Answer([], str(error), "threads"))
        return call, thread

    def _end(self, call: Future[_Answer], thread: threading.Thread | None, n_documents: int) -> list[Any]:
        if call.done():
            answer = call.result()
        else:
            self._late = thread
            answer = _Answer([], "the store did not answer in time", "late")
        if not answer.problem:
            return answer.values
        self._pause_ends = time.monotonic() + PAUSE_SECONDS
        if answer.kind not in self._logged:
            self._logged.add(answer.kind)
            rule = (
                "the encodings of %d passages were not fetched, and are made anew; the store is left alone for %g seconds "
                "(logged once for a reason): %s"
            )
            logger.warning(rule, n_documents, PAUSE_SECONDS, answer.problem)
        return [None] * n_documents

    def __copy__(self) -> Fetcher[Doc]:
        """Return itself: what it has fetched serves copies of a component, too."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Fetcher[Doc]:
        """Return itself; see `__copy__`."""
        return self


def _answer(fetch: Fetch, documents: Sequence[Any]) -> _Answer:
    try:
        iterator = iterator_of(fetch(documents))
        values = None if iterator is None else list(iterator)
    except BaseException as error:  # whatever it is, a query waits for an answer
        return _Answer([], f"{type(error).__name__}: {str(error)[:200]}", type(error).__name__)
    if values is None or len(values) != len(documents):
        got = "no list" if values is None else f"{len(values)} values"
        return _Answer(
            [], f"fetch must return an encoding, or None, for each of {len(documents)} documents, but returned {got}", "answer"
        )
    return _Answer(values)


def fetch(
    fetcher: Fetcher[Doc], reranker: Reranker, passages: Sequence[Passage], documents: Sequence[Doc], deadline: float | None
) -> list[Passage]:
    """Return passages with the encodings that they came without, as far as a store has them and memory has not.

    Args:
        fetcher: asks the store.
        reranker: has the memory.
        passages: of the query.
        documents: which they are of.
        deadline: of the query, by `time.monotonic`.
    """
    bare = _bare(passages)
    if not bare:
        return list(passages)
    asked = _with_origin(passages, fetcher)
    wanted = _wanted(bare, reranker.read([asked[index] for index in bare]))
    values = fetcher.ask([documents[index] for index in wanted], _patience(deadline)) if wanted else []
    return _filled(asked, wanted, values)


async def afetch(
    fetcher: Fetcher[Doc], reranker: Reranker, passages: Sequence[Passage], documents: Sequence[Doc], deadline: float | None
) -> list[Passage]:
    """Do what `fetch` does, while the event loop goes on."""
    bare = _bare(passages)
    if not bare:
        return list(passages)
    asked = _with_origin(passages, fetcher)
    wanted = _wanted(bare, await reranker.aread([asked[index] for index in bare]))
    values = await fetcher.aask([documents[index] for index in wanted], _patience(deadline)) if wanted else []
    return _filled(asked, wanted, values)


def _bare(passages: Sequence[Passage]) -> list[int]:
    return [index for index, passage in enumerate(passages) if passage.encoding is None]


def _with_origin(passages: Sequence[Passage], fetcher: Fetcher[Any]) -> list[Passage]:
    """Name the store for those passages that it is asked for: what came by another way is not remembered as its own."""
    return [replace(p, origin=fetcher.origin) if p.encoding is None else p for p in passages]


def _wanted(bare: Sequence[int], reading: Reading) -> list[int]:
    return [index for index, status in zip(bare, reading, strict=True) if status == "missing"]


def _patience(deadline: float | None) -> float:
    return FETCH_SECONDS if deadline is None else max(0.0, min(FETCH_SECONDS, (deadline - time.monotonic()) / 2))


def _filled(passages: Sequence[Passage], wanted: Sequence[int], values: Sequence[Any]) -> list[Passage]:
    filled = list(passages)
    for index, value in zip(wanted, values, strict=True):
        filled[index] = replace(filled[index], encoding=value)
    return filled
