"""One query of a host: what is missing, fetched, told and written back. And what ingest adds to documents."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from kalm_integrations import tracing
from kalm_integrations.core.base import Reranker
from kalm_integrations.core.fallback import keep_order, note_answer, too_late
from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY, Metadata, Passage, Ranking, Reading
from kalm_integrations.errors import DeadlineExceededError, EncodingError, SettingsError
from kalm_integrations.hosting.fetching import afetch, fetch
from kalm_integrations.hosting.fields import RerankFields
from kalm_integrations.hosting.models import WithModel, kept_fingerprint
from kalm_integrations.hosting.write_back import hand_over

logger = logging.getLogger(__name__)

N_NOTED = 10
"""A query that has to encode fewer passages than this says nothing about it."""

MIN_TIMEOUT = 1e-6
"""Seconds that are given to a model for which no time is left."""

Doc = TypeVar("Doc")

_noted = threading.Event()


def encode(reranker: Reranker, passages: Sequence[Passage], *, show_progress: bool = False) -> list[Metadata]:
    """Return what to store with each passage; those that carry a valid encoding keep it."""
    _, made = encode_missing(reranker, passages, show_progress=show_progress)
    return _with_kept(reranker, passages, made)


async def aencode(component: WithModel, passages: Sequence[Passage], *, show_progress: bool = False) -> list[Metadata]:
    """Do what `encode` does; no thread waits for the model, and what is left is not encoded if the coroutine is cancelled."""
    reranker = await component.areranker()
    missing = (await reranker.aread(passages)).not_stored
    made: list[Metadata] = []
    if missing:
        with tracing.encoding(reranker, len(missing)):
            made = await reranker.aencode_to_metadata([passages[index].text for index in missing], show_progress)
    return _with_kept(reranker, passages, dict(zip(missing, made, strict=True)))


def _with_kept(reranker: Reranker, passages: Sequence[Passage], made: Mapping[int, Metadata]) -> list[Metadata]:
    return [made[index] if index in made else kept_metadata(reranker, passage) for index, passage in enumerate(passages)]


def kept_metadata(reranker: Reranker, passage: Passage) -> Metadata:
    """Return what to store with a passage whose encoding was found valid: it may come without its companion.

    An export, or another host, has left that out.
    """
    encoding = passage.encoding or ""
    return {ENCODING_KEY: encoding, FINGERPRINT_KEY: kept_fingerprint(reranker, encoding)}


def encode_missing(
    reranker: Reranker, passages: Sequence[Passage], *, show_progress: bool = False
) -> tuple[Reading, dict[int, Metadata]]:
    """Return the reading of passages and, by index, what to store with those that carry no valid encoding."""
    reading = reranker.read(passages)
    missing = reading.not_stored
    if not missing:
        return reading, {}
    with tracing.encoding(reranker, len(missing)):
        made = reranker.encode_to_metadata([passages[index].text for index in missing], show_progress)
    return reading, dict(zip(missing, made, strict=True))


@dataclass(frozen=True)
class HostQuery(Generic[Doc]):
    """A query of a host: its documents as passages, the component's rules, and how what was encoded is handed over."""

    component: WithModel
    """Has the reranker, which is opened if need be."""
    fields: RerankFields
    """The component's."""
    query: str
    documents: Sequence[Any]
    """As they came, for `fetch`."""
    passages: Sequence[Passage]
    """The documents' texts, with the encodings that came with them."""
    names: Sequence[str]
    """Of the documents, for messages; of several with one name the last is handed over."""
    copy: Callable[[int], Doc]
    """Makes a copy of the document at an index that its owner cannot change any more."""
    attach: Callable[[Doc, Metadata], Doc]
    """Makes a copy of such a copy that carries what to store."""
    top_k: int | None
    """How many to return at most; None returns all."""
    score_threshold: float | None = None
    """Replaces the component's for this call."""
    instruction: str | None = None
    """Replaces the component's for this call."""
    first_stage_scores: Sequence[Any] | None = None
    """Of the documents; None in it: a document has none."""
    write: Callable[[list[Doc]], object] | None = None
    """Takes the documents with their encodings; None takes the component's `write_back`."""
    store: object = None
    """What `write` writes to, if that is not the component's `write_back`."""

    def check(self) -> None:
        """Check what can be checked before the model is asked.

        Raises:
            SettingsError: a score that `fusion` needs is not there.
        """
        if self.first_stage_scores is not None:
            _check_scored(self.first_stage_scores, self.names)

    @property
    def must_be_stored(self) -> bool:
        """Whether the passages are to be read before they are ranked."""
        return self.fields.on_missing == "error"

    def check_stored(self, reading: Reading) -> Reading:
        """Return the reading of the passages.

        Raises:
            EncodingError: a document has no valid encoding, neither with it nor, by its text, in the payload store.
        """
        _check_stored(reading, [index for index in self.not_stored(reading) if reading[index] != "found"], self.names)
        return reading

    def not_stored(self, reading: Reading) -> list[int]:
        """Return the indices of the documents that have no valid encoding in their store, as far as this is known.

        Where encodings are fetched, a store is not asked for what memory has: it had that, or was given it when it was made.
        """
        fetches = self.fields.fetcher() is not None
        return [index for index in reading.not_stored if not (fetches and reading[index] in ("cached", "found"))]

    def arguments(self) -> dict[str, Any]:
        """Return what the reranker is asked beside the passages."""
        fields = self.fields
        # Of a reranker of somebody else's that knows no spans, none are asked unless they are needed.
        spans = {"spans": len(self.passages)} if fields.needs_spans else {}
        return spans | {
            "top_k": self.top_k,
            "score_threshold": fields.score_threshold if self.score_threshold is None else self.score_threshold,
            "instruction": fields.instruction if self.instruction is None else self.instruction,
            "first_stage_scores": self.first_stage_scores,
            "fusion": fields.fusion,
            # Without a fusion a weight has no effect.
            "fusion_weight": None if fields.fusion is None else fields.fusion_weight,
        }

    def finish(self, ranking: Ranking) -> Ranking:
        """Hand over the documents that came without a valid encoding, to be written in the background.

        Raises:
            SettingsError: spans are needed, and the reranker gives none.
        """
        if self.fields.needs_spans:
            _check_spans(ranking)
        note_answer()
        _note(ranking.reading)
        write = self.fields.write_back if self.write is None else self.write
        if write is not None:
            _write_back(write if self.store is None else self.store, write, ranking, self)
        return ranking

    def give_up(self, error: Exception) -> Ranking:
        """Return the documents in their order if the component's `on_error` says so.

        Raises:
            Exception: the error, if it does not.
        """
        return keep_order(error, self.fields.on_error, self.passages, self.top_k)


def rank(query: HostQuery[Any]) -> Ranking:
    """Rank a host's documents by the rules of a component, and hand over those that came without a valid encoding.

    Every encoding is read once, and every missing passage encoded once. The thread waits.

    Raises:
        EncodingError: `on_missing` is "error", and a document has no valid encoding.
        SettingsError: an argument is out of range, or a score that `fusion` needs is not there.
        KalmError: the reranker is late or fails, and `on_error` is "raise".
    """
    query.check()
    timeout = query.fields.timeout
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        reranker = query.component.reranker
        passages: Any = query.passages
        fetcher = query.fields.fetcher()
        if deadline is not None and (fetcher is not None or query.must_be_stored):
            reranker.get_ready(_left(deadline))
        if fetcher is not None:
            passages = fetch(fetcher, reranker, passages, query.documents, deadline)
        if query.must_be_stored:
            passages = query.check_stored(reranker.read(passages))
        left = None if deadline is None else _left(deadline)
        return query.finish(reranker.rank(query.query, passages, **query.arguments(), timeout=left))
    except DeadlineExceededError:
        # Named after the component's time-out, not after what was left of it.
        return query.give_up(too_late(timeout))
    except Exception as error:
        return query.give_up(error)


async def arank(query: HostQuery[Any]) -> Ranking:
    """Do what `rank` does; no thread waits for the model, and a coroutine that is cancelled takes its request back."""
    query.check()
    timeout = query.fields.timeout
    task = asyncio.ensure_future(_arank(query, None if timeout is None else time.monotonic() + timeout))
    try:
        return await asyncio.wait_for(task, timeout)
    except asyncio.TimeoutError as error:
        return query.give_up(too_late(timeout) if task.cancelled() else error)
    except Exception as error:
        return query.give_up(error)


async def _arank(query: HostQuery[Any], deadline: float | None) -> Ranking:
    reranker = await query.component.areranker()
    passages: Any = query.passages
    fetcher = query.fields.fetcher()
    if fetcher is not None:
        passages = await afetch(fetcher, reranker, passages, query.documents, deadline)
    if query.must_be_stored:
        passages = query.check_stored(await reranker.aread(passages))
    return query.finish(await reranker.arank(query.query, passages, **query.arguments()))


def _left(deadline: float) -> float:
    # Something is left in any case: a time-out is positive.
    return max(MIN_TIMEOUT, deadline - time.monotonic())


def _write_back(target: object, write: Callable[[list[Doc]], object], ranking: Ranking, query: HostQuery[Doc]) -> None:
    """Hand over documents with their encodings: what is copied here belongs to the query, all else is done after it."""
    missing = {query.names[index]: index for index in query.not_stored(ranking.reading)}.values()
    copies = {index: query.copy(index) for index in missing}
    if not copies:
        return

    def work() -> None:
        made = ranking.to_metadata(list(copies))
        write([query.attach(copies[index], metadata) for index, metadata in made.items()])

    hand_over(target, len(copies), work)


def _check_stored(reading: Reading, missing: Sequence[int], names: Sequence[str]) -> None:
    if missing:
        msg = (
            "with on_missing='error' every document must carry a valid encoding of its text and this model, but "
            f"{len(missing)} of {len(reading)} do not, the first being {names[missing[0]]} ({reading[missing[0]]}); encode "
            "them at ingest or run backfill, or set on_missing='encode'"
        )
        raise EncodingError(msg)


def _check_scored(scores: Sequence[Any], names: Sequence[str]) -> None:
    missing = [index for index, score in enumerate(scores) if score is None]
    if missing:
        msg = (
            f"this fusion needs a first-stage score with every document, but {len(missing)} of {len(scores)} have none, the "
            f"first being {names[missing[0]]}; use a retriever that gives scores, or fusion='reciprocal_rank' with the order "
            "of the documents"
        )
        raise SettingsError(msg)


def _check_spans(ranking: Ranking) -> None:
    missing = [place.index for place in ranking if place.is_scored and place.spans is None]
    if missing:
        msg = (
            "highlight and prune need a reranker whose `rank` takes spans, but this one returned "
            f"{len(missing)} of {len(ranking)} passages without; use another reranker, or set both to False"
        )
        raise SettingsError(msg)


def _note(reading: Reading) -> None:
    """Say once per process that a query encodes what ingest should have encoded."""
    counts = reading.counts
    n_unusable = counts["missing"] + counts["stale"] + counts["corrupt"]
    if n_unusable < N_NOTED or 2 * n_unusable <= len(reading) or _noted.is_set():
        return
    _noted.set()
    logger.warning(
        "%d of %d candidates carried no usable encoding: %d stale, %d missing, %d corrupt. They are encoded for this query, "
        "which takes time; encode at ingest, or see backfill",
        n_unusable,
        len(reading),
        counts["stale"],
        counts["missing"],
        counts["corrupt"],
    )
