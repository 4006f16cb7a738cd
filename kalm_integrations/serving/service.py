"""The service behind the endpoints: it opens the reranker, asks it, and counts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException

from kalm_integrations import __version__, tracing
from kalm_integrations.core.base import Reranker
from kalm_integrations.core.types import AnyPassage, Metadata, Ranking, Reading, Status, shown
from kalm_integrations.errors import DeadlineExceededError, KalmError
from kalm_integrations.remote.protocol import ServiceFacts
from kalm_integrations.serving.errors import INTERNAL
from kalm_integrations.serving.metrics import Metrics, as_kalm
from kalm_integrations.serving.settings import ServiceSettings

logger = logging.getLogger(__name__)

FEED_SECONDS = 5.0
"""How often numbers are brought up to date while nobody asks: what is written in the background, and for other workers."""

NOTES = "kalm_integrations.notes"
"""Where a request's scope holds what the access log is to say of it."""

FOUND: tuple[Status, ...] = ("stored", "cached", "found")
"""Statuses of passages that need not be encoded."""

OpenReranker = Callable[[ServiceSettings], Reranker]


def open_kalm(settings: ServiceSettings) -> Reranker:
    """Open the model that a service is told to serve.

    Raises:
        KalmError: it cannot be opened.
    """
    from kalm_integrations.core.reranker import KalmReranker

    return KalmReranker.from_pretrained(settings.model, **settings.reranker_settings())


@dataclass(frozen=True)
class Question:
    """What all formats of reranking ask for."""

    query: str
    texts: list[str]
    model: str | None = None
    top_n: int | None = None
    """How many are wanted; None and 0: all."""
    instruction: str | None = None
    max_tokens: int | None = None
    """Of each text, its first ones."""
    spans: bool = False
    """Whether the texts that are returned come with their spans."""


class Service:
    """One reranker, asked by many clients."""

    def __init__(self, settings: ServiceSettings) -> None:
        """Make a service whose reranker is still to be opened."""
        self.settings = settings
        self.metrics = Metrics()
        self._reranker: Reranker | None = None
        self._failure: Exception | None = None

    @property
    def reranker(self) -> Reranker:
        """The reranker.

        Raises:
            HTTPException: it is not there yet, or cannot be opened.
        """
        if self._reranker is None:
            detail = "the model is still being loaded; ask again soon" if self._failure is None else INTERNAL
            raise HTTPException(503, detail)
        return self._reranker

    def open(self, open_reranker: OpenReranker, on_failure: Callable[[Exception], object]) -> None:
        """Begin to open the reranker, on a thread that nobody has to wait for when the process ends."""
        loop = asyncio.get_running_loop()

        def finish(reranker: Reranker | None, failure: Exception | None) -> None:
            self._reranker, self._failure = reranker, failure
            if failure is not None:
                on_failure(failure)
            else:
                self.metrics.ready.set(1)

        def work() -> None:
            reranker, failure = None, None
            try:
                reranker = open_reranker(self.settings)
                reranker.warm_up()
            except Exception as error:
                reranker, failure = None, error
            with contextlib.suppress(RuntimeError):  # the service has ended meanwhile
                loop.call_soon_threadsafe(finish, reranker, failure)

        threading.Thread(target=work, name="kalm-opening", daemon=True).start()

    async def feed_regularly(self) -> None:
        """Bring the numbers up to date again and again."""
        while True:
            await asyncio.sleep(FEED_SECONDS)
            await self.measure()

    def feed(self) -> None:
        """Bring the numbers of requests up to date."""
        if self._reranker is not None:
            self.metrics.feed(self._reranker)

    async def measure(self) -> None:
        """Bring all numbers up to date."""
        self.feed()
        if self._reranker is not None:
            await asyncio.to_thread(self.metrics.measure_store, self._reranker)

    async def close(self) -> None:
        """Have what is to be stored written."""
        if self._reranker is not None:
            is_written = await asyncio.to_thread(self._reranker.flush, float(self.settings.shutdown_seconds))
            if not is_written:
                logger.error("encodings were not written to the store in %d seconds", self.settings.shutdown_seconds)
            self.metrics.ready.set(0)

    def name(self, model: str | None) -> str:
        """Return the name by which a request calls the model, or ours if it calls it by none.

        Raises:
            HTTPException: it is another model's.
        """
        names = self.settings.names
        if model is not None and model not in names:
            raise HTTPException(404, f"model must be one of {', '.join(names)}, but got {shown(model)}")
        return model or names[0]

    @property
    def max_tokens_read(self) -> int | None:
        """How much of a text is read; None for a reranker that is not loaded, or none of ours."""
        kalm = None if self._reranker is None else as_kalm(self._reranker)
        return None if kalm is None else kalm.max_tokens_read

    @property
    def windows_fingerprint(self) -> str | None:
        """What encodings of passages in windows carry; None where they are cut, and for a reranker that is none of ours."""
        kalm = as_kalm(self.reranker)
        return None if kalm is None else (*kalm.fingerprints, None)[1]

    def facts(self) -> ServiceFacts:
        """Return what the service's encodings are."""
        reranker = self.reranker
        kalm = as_kalm(reranker)
        return ServiceFacts(
            model=self.settings.names[0],
            fingerprint=reranker.fingerprint,
            windows_fingerprint=self.windows_fingerprint,
            compression_ratio=1 if kalm is None else kalm.compression_ratio,
            storage_codec="fp32" if kalm is None else kalm.storage_codec,
            version=__version__,
            spans=True,
            max_passage_tokens=None if kalm is None else kalm.max_passage_tokens,
        )

    async def answer(self, request: Request, question: Question) -> Ranking:
        """Return the ranking of a question's texts.

        Raises:
            HTTPException: the service cannot answer it.
            KalmError: the reranker cannot.
        """
        note(request, n_documents=len(question.texts))
        self.name(question.model)
        self.check_count(len(question.texts))
        reranker, texts = self.reranker, question.texts
        if question.max_tokens is not None and texts:
            texts = await asyncio.to_thread(truncate, reranker, texts, question.max_tokens)
        spans = len(texts) if question.spans and texts else None
        return await self.rank(request, question.query, texts, question.instruction, question.top_n or None, spans=spans)

    async def rank(
        self,
        request: Request,
        query: str,
        passages: Sequence[AnyPassage] | Reading,
        instruction: str | None,
        top_k: int | None = None,
        reranker: Reranker | None = None,
        spans: int | None = None,
    ) -> Ranking:
        """Return a ranking, in the service's time, by its own reranker or by another of the same model."""
        reranker, timeout = reranker or self.reranker, self.settings.timeout
        with tracing.from_headers(request.headers):
            ranking = await reranker.arank(query, passages, top_k, instruction=instruction, spans=spans, timeout=timeout)
        found = sum(ranking.counts[status] for status in FOUND)
        note(request, n_found=found, n_encoded=len(ranking.reading) - found)
        return ranking

    async def encode(self, request: Request, texts: list[str], timeout: float | None) -> list[Metadata]:
        """Return the metadata to store with texts.

        Raises:
            DeadlineExceededError: it took longer than `timeout` seconds.
        """
        reranker = self.reranker
        try:
            with tracing.from_headers(request.headers), tracing.encoding(reranker, len(texts)):
                return await asyncio.wait_for(reranker.aencode_to_metadata(texts), timeout)
        except asyncio.TimeoutError as error:
            if isinstance(error, KalmError):
                raise
            msg = f"texts must be encoded within {timeout:g} seconds, but were not; send fewer at a time, or a stream of lines"
            raise DeadlineExceededError(msg) from error

    def check_count(self, n_texts: int) -> None:
        """Check how many texts a request brings.

        Raises:
            HTTPException: too many.
        """
        if n_texts > self.settings.max_documents:
            limit = self.settings.max_documents
            raise HTTPException(413, f"a request must hold at most {limit:,} texts, but holds {n_texts:,}; send several")


def note(request: Request, **facts: Any) -> None:
    """Have the access log say something about a request: numbers and names, no texts."""
    request.scope.setdefault(NOTES, {}).update(facts)


def truncate(reranker: Reranker, texts: list[str], max_tokens: int) -> list[str]:
    """Return texts cut to their first tokens, if the reranker is one of ours and would read more."""
    kalm = as_kalm(reranker)
    if kalm is None or max_tokens >= kalm.max_tokens_read:
        return texts
    return kalm.truncate(texts, max_tokens)
