"""One query of a host: what is missing, who is told, and what is written back. And what ingest adds to documents."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

from kalm_integrations.core.base import Reranker
from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY, FusionMethod, Metadata, Passage, Ranking, Reading
from kalm_integrations.errors import EncodingError, SettingsError

logger = logging.getLogger(__name__)

OnMissing: TypeAlias = Literal["encode", "error"]
"""What to do about documents without a valid encoding."""

N_NOTED = 10
"""A query that has to encode fewer passages than this says nothing about it."""

Doc = TypeVar("Doc")

_noted = threading.Event()


def encode(reranker: Reranker, passages: Sequence[Passage], *, show_progress: bool = False) -> list[Metadata]:
    """Return what to store with each passage; those that carry a valid encoding keep it."""
    reading = reranker.read(passages)
    missing = reading.not_stored
    made = reranker.encode_to_metadata([passages[index].text for index in missing], show_progress) if missing else []
    # A kept encoding may come without its companion, from an export or another host.
    fingerprint = reranker.fingerprint
    encoded = [{ENCODING_KEY: passage.encoding or "", FINGERPRINT_KEY: fingerprint} for passage in passages]
    for index, metadata in zip(missing, made, strict=True):
        encoded[index] = metadata
    return encoded


def rank(
    reranker: Reranker,
    query: str,
    passages: Sequence[Passage],
    names: Sequence[str],
    *,
    on_missing: OnMissing,
    top_k: int | None,
    score_threshold: float | None,
    instruction: str | None,
    fusion: FusionMethod | None,
    fusion_weight: float | None,
    first_stage_scores: Sequence[Any] | None,
) -> Ranking:
    """Rank a host's passages; every encoding is read once.

    Args:
        reranker: ranks them.
        query: the query.
        passages: texts with the encodings that came with them.
        names: of the passages, for messages.
        on_missing: what to do about passages without a valid encoding.
        top_k: see `KalmReranker.rank`, as the rest.
        score_threshold: of P(yes).
        instruction: of this query.
        fusion: with the first stage's scores or ranks.
        fusion_weight: without a fusion it has no effect.
        first_stage_scores: of the passages; None in it: a passage has none.

    Raises:
        EncodingError: `on_missing` is "error", and a passage has no valid encoding.
        SettingsError: an argument is out of range, or a score that `fusion` needs is not there.
    """
    if first_stage_scores is not None:
        _check_scored(first_stage_scores, names)
    reading = reranker.read(passages)
    if on_missing == "error":
        _check_stored(reading, names)
    _note(reading)
    return reranker.rank(
        query,
        reading,
        top_k=top_k,
        score_threshold=score_threshold,
        instruction=instruction,
        first_stage_scores=first_stage_scores,
        fusion=fusion,
        fusion_weight=None if fusion is None else fusion_weight,
    )


def write_back(
    target: Callable[[list[Doc]], object] | None,
    ranking: Ranking,
    names: Sequence[str],
    attach: Callable[[int, Metadata], Doc],
) -> None:
    """Hand over the documents that came without a valid encoding, with the encodings that the ranking made or found.

    Whatever fails is logged: an encoding that is not kept costs time, never a result.

    Args:
        target: takes the documents; None: nobody does.
        ranking: of the documents.
        names: of the documents; of several with one name the last is handed over.
        attach: makes a copy of the document at an index that carries what to store.
    """
    missing = list({names[index]: index for index in ranking.reading.not_stored}.values())
    if target is None or not missing:
        return
    try:
        made = ranking.to_metadata(missing)
        target([attach(index, metadata) for index, metadata in made.items()])
    except Exception:
        logger.exception("could not write back the encodings of %d documents; the query is answered", len(missing))


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
