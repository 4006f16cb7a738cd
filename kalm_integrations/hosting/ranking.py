"""One query of a host: what is missing, who is told, and what is written back. And what ingest adds to documents."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from kalm_integrations.core.base import Reranker
from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY, Metadata, Passage, Ranking, Reading
from kalm_integrations.errors import EncodingError, SettingsError
from kalm_integrations.hosting.fields import RerankFields
from kalm_integrations.hosting.write_back import hand_over

logger = logging.getLogger(__name__)

N_NOTED = 10
"""A query that has to encode fewer passages than this says nothing about it."""

Doc = TypeVar("Doc")

_noted = threading.Event()


def encode(reranker: Reranker, passages: Sequence[Passage], *, show_progress: bool = False) -> list[Metadata]:
    """Return what to store with each passage; those that carry a valid encoding keep it."""
    _, made = encode_missing(reranker, passages, show_progress=show_progress)
    # A kept encoding may come without its companion, from an export or another host.
    fingerprint = reranker.fingerprint
    return [
        made.get(index, {ENCODING_KEY: passage.encoding or "", FINGERPRINT_KEY: fingerprint})
        for index, passage in enumerate(passages)
    ]


def encode_missing(
    reranker: Reranker, passages: Sequence[Passage], *, show_progress: bool = False
) -> tuple[Reading, dict[int, Metadata]]:
    """Return the reading of passages and, by index, what to store with those that carry no valid encoding."""
    reading = reranker.read(passages)
    missing = reading.not_stored
    made = reranker.encode_to_metadata([passages[index].text for index in missing], show_progress) if missing else []
    return reading, dict(zip(missing, made, strict=True))


def rank(
    fields: RerankFields,
    reranker: Reranker,
    query: str,
    passages: Sequence[Passage],
    names: Sequence[str],
    copy: Callable[[int], Doc],
    attach: Callable[[Doc, Metadata], Doc],
    *,
    top_k: int | None,
    score_threshold: float | None = None,
    instruction: str | None = None,
    first_stage_scores: Sequence[Any] | None = None,
    write: Callable[[list[Doc]], object] | None = None,
    store: object = None,
) -> Ranking:
    """Rank a host's documents by the rules of a component, and hand over those that came without a valid encoding.

    They are written in the background, after the answer; see `write_back`.

    Every encoding is read once, and every missing passage encoded once.

    Args:
        fields: the component's.
        reranker: ranks them.
        query: the query.
        passages: the documents' texts, with the encodings that came with them.
        names: of the documents, for messages; of several with one name the last is handed over.
        copy: makes a copy of the document at an index that its owner cannot change any more.
        attach: makes a copy of such a copy that carries what to store.
        top_k: how many to return at most; None returns all.
        score_threshold: replaces the component's for this call.
        instruction: replaces the component's for this call.
        first_stage_scores: of the documents; None in it: a document has none.
        write: takes the documents with their encodings; None takes the component's `write_back`.
        store: what `write` writes to, if that is not the component's `write_back`.

    Raises:
        EncodingError: `on_missing` is "error", and a document has no valid encoding.
        SettingsError: an argument is out of range, or a score that `fusion` needs is not there.
    """
    if first_stage_scores is not None:
        _check_scored(first_stage_scores, names)
    reading = reranker.read(passages)
    if fields.on_missing == "error":
        _check_stored(reading, names)
    _note(reading)
    ranking = reranker.rank(
        query,
        reading,
        top_k=top_k,
        score_threshold=fields.score_threshold if score_threshold is None else score_threshold,
        instruction=fields.instruction if instruction is None else instruction,
        first_stage_scores=first_stage_scores,
        fusion=fields.fusion,
        # Without a fusion a weight has no effect.
        fusion_weight=None if fields.fusion is None else fields.fusion_weight,
    )
    write = fields.write_back if write is None else write
    if write is not None:
        _write_back(write if store is None else store, write, ranking, names, copy, attach)
    return ranking


def _write_back(
    target: object,
    write: Callable[[list[Doc]], object],
    ranking: Ranking,
    names: Sequence[str],
    copy: Callable[[int], Doc],
    attach: Callable[[Doc, Metadata], Doc],
) -> None:
    """Hand over documents with their encodings: what is copied here belongs to the query, all else is done after it."""
    missing = {names[index]: index for index in ranking.reading.not_stored}.values()
    copies = {index: copy(index) for index in missing}
    if not copies:
        return

    def work() -> None:
        made = ranking.to_metadata(list(copies))
        write([attach(copies[index], metadata) for index, metadata in made.items()])

    hand_over(target, len(copies), work)


def _check_stored(reading: Reading, names: Sequence[str]) -> None:
    missing = reading.not_stored
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
