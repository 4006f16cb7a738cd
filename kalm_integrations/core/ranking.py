"""From margins to a ranking: scores, fusion with the first stage, cut. Pure functions without torch, for every reranker."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from kalm_integrations.core.types import FusionMethod, RankedPassage, as_number, checked_list, plain, shown
from kalm_integrations.errors import SettingsError

DEFAULT_WEIGHTS: dict[FusionMethod, float] = {"z_score": 0.5, "reciprocal_rank": 0.5}
"""The reranker's share where none is given."""

RANK_CONSTANT = 60
"""Added to ranks, so that the first few do not decide alone: the value of Cormack, Clarke and Büttcher (SIGIR 2009)."""


def check_count(value: object, name: str) -> int | None:
    """Return a number of results as an int; None means all. numpy's whole numbers are numbers too.

    Raises:
        SettingsError: it is no positive whole number.
    """
    count = plain(value)
    if count is not None and (type(count) is not int or count < 1):
        msg = f"{name} must be a positive whole number, or None for all, but got {shown(value)}"
        raise SettingsError(msg)
    return count


def check_threshold(value: object, name: str) -> float | None:
    """Return a threshold as a float; None sets none.

    Raises:
        SettingsError: it is no number; one that is NaN would leave out everything.
    """
    if value is None:
        return None
    threshold = as_number(value)
    if math.isnan(threshold):
        msg = f"{name} must be a number or None, but got {shown(value)}"
        raise SettingsError(msg)
    return threshold


def sigmoid(margin: float) -> float:
    """Return P(yes) of a margin."""
    # By the smaller exponential, so that none overflows.
    odds = math.exp(-abs(margin))
    return (odds if margin < 0 else 1.0) / (1 + odds)


@dataclass(frozen=True)
class RankRules:
    """How margins become a ranking: fused with the first stage's scores or not, and cut where."""

    top_k: int | None = None
    score_threshold: float | None = None
    fusion: FusionMethod | None = None
    fusion_weight: float | None = None

    def __post_init__(self) -> None:
        """Check the rules, and keep them as plain numbers and names.

        Raises:
            SettingsError: one is out of range, or `fusion_weight` comes without a fusion.
        """
        top_k = check_count(self.top_k, "top_k")
        score_threshold = check_threshold(self.score_threshold, "score_threshold")
        fusion, fusion_weight = check_fusion(self.fusion, self.fusion_weight)
        self.__dict__.update(top_k=top_k, score_threshold=score_threshold, fusion=fusion, fusion_weight=fusion_weight)

    def apply(
        self,
        margins: Sequence[float],
        scores: Sequence[float],
        texts: Sequence[str | None],
        first_stage_scores: Sequence[float] | None = None,
    ) -> list[RankedPassage]:
        """Return passages by falling margin, which keeps apart what rounds to the same score; ties keep their order.

        With a fusion the fused values decide, and the margin between equal ones. Passages that score less than
        `score_threshold` are left out before the list is cut to `top_k`.

        Args:
            margins: of all passages of a query.
            scores: made of the margins.
            texts: of the passages, where they are known.
            first_stage_scores: checked ones; see `check_first_stage`.
        """
        fused: Sequence[float | None] = [None] * len(margins)
        if self.fusion is not None:
            fused = fuse(margins, first_stage_scores, self.fusion, self.fusion_weight)
        rows = enumerate(zip(scores, margins, fused, texts, strict=True))
        ranked = [RankedPassage(index, *row) for index, row in rows]
        ranked.sort(key=lambda passage: (-(passage.fused or 0.0), -passage.margin))
        if self.score_threshold is not None:
            ranked = [passage for passage in ranked if passage.score >= self.score_threshold]
        return ranked[: self.top_k]


def check_fusion(fusion: Any, fusion_weight: Any) -> tuple[FusionMethod | None, float | None]:
    """Return how scores are to be fused: a method, and the reranker's share.

    Raises:
        SettingsError: the method is unknown, the weight is not between 0 and 1, or there is a weight but no method.
    """
    methods: tuple[FusionMethod, ...] = get_args(FusionMethod)
    method: FusionMethod | None = plain(fusion)
    # An array would compare with each of them.
    if method is not None and not (isinstance(method, str) and method in methods):
        msg = f"fusion must be one of {', '.join(methods)} or None, but got {shown(fusion)}"
        raise SettingsError(msg)
    if fusion_weight is None:
        return method, None
    if method is None:
        msg = f"fusion_weight={shown(fusion_weight)} needs a fusion, but got None; set fusion to one of {', '.join(methods)}"
        raise SettingsError(msg)
    weight = as_number(fusion_weight)
    if not 0 <= weight <= 1:
        msg = (
            f"fusion_weight must be a number from 0 (first stage alone) to 1 (reranker alone), but got {shown(fusion_weight)}"
        )
        raise SettingsError(msg)
    return method, weight


def check_first_stage(scores: Sequence[Any] | None, n_passages: int, fusion: FusionMethod | None) -> list[float] | None:
    """Return the first stage's scores as floats, or None where the order of the passages stands for them.

    Args:
        scores: of each passage, higher is better.
        n_passages: how many there must be.
        fusion: a checked method.

    Raises:
        SettingsError: they are missing, not as many as the passages, not finite numbers, or given without a method.
    """
    if scores is None:
        if fusion == "z_score":
            msg = (
                "fusion='z_score' needs first_stage_scores, but got None; pass one score for each passage, or use "
                "fusion='reciprocal_rank', which takes the order of the passages"
            )
            raise SettingsError(msg)
        return None
    if fusion is None:
        msg = "first_stage_scores are for fusion, but fusion is None; set fusion, or leave them out"
        raise SettingsError(msg)
    scores = checked_list(scores, "first_stage_scores")
    if len(scores) != n_passages:
        msg = f"first_stage_scores must hold one score for each of {n_passages} passages, but hold {len(scores)}"
        raise SettingsError(msg)
    return [_finite(score, index) for index, score in enumerate(scores)]


def check_first_stages(
    scores: Sequence[Sequence[Any]] | None, lists: Sequence[Sequence[Any]], fusion: FusionMethod | None
) -> list[list[float] | None]:
    """Do what `check_first_stage` does for each of several queries.

    Args:
        scores: for each query, those of its passages; None if there are none at all.
        lists: for each query, its passages.
        fusion: a checked method.

    Raises:
        SettingsError: see `check_first_stage`; or there are not as many lists of scores as queries.
    """
    if scores is None:
        return [check_first_stage(None, len(passages), fusion) for passages in lists]
    scores = checked_list(scores, "first_stage_scores")
    if len(scores) != len(lists):
        msg = f"first_stage_scores must hold a list for each of {len(lists)} queries, but hold {len(scores)}"
        raise SettingsError(msg)
    return [check_first_stage(of_query, len(passages), fusion) for of_query, passages in zip(scores, lists, strict=True)]


def fuse(
    margins: Sequence[float],
    first_stage_scores: Sequence[float] | None,
    fusion: FusionMethod,
    fusion_weight: float | None = None,
) -> list[float]:
    """Return one value for each candidate of a query, higher is better.

    `z_score`: each side is scaled to mean 0 and deviation 1 over the candidates, then both are added with their weights.
    `reciprocal_rank`: the weighted sum of 1 / (60 + rank), rank 1 being the best; equal values share the better rank.
    A side that gives all candidates the same value changes no order.

    Args:
        margins: the reranker's, finite.
        first_stage_scores: of the same candidates, finite, higher is better. None: their order is the first stage's, best
            first, which only `reciprocal_rank` can use.
        fusion: the method.
        fusion_weight: of the reranker's side, from 0 to 1; the first stage has the rest. None takes the method's default.
    """
    if first_stage_scores is None:
        first_stage_scores = [-float(place) for place in range(len(margins))]
    scale = _z_scores if fusion == "z_score" else _reciprocal_ranks
    weight = DEFAULT_WEIGHTS[fusion] if fusion_weight is None else fusion_weight
    sides = zip(scale(margins), scale(first_stage_scores), strict=True)
    return [weight * reranked + (1 - weight) * first for reranked, first in sides]


def _z_scores(values: Sequence[float]) -> list[float]:
    peak = max(map(abs, values), default=0.0)
    if not values or min(values) == max(values):
        return [0.0] * len(values)
    # Divided first, so that no square of a huge score overflows.
    scaled = [value / peak for value in values]
    mean = math.fsum(scaled) / len(scaled)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in scaled) / len(scaled))
    # Values that differ by less than their rounding error have no deviation.
    return [(value - mean) / deviation if deviation else 0.0 for value in scaled]


def _reciprocal_ranks(values: Sequence[float]) -> list[float]:
    ranks: dict[float, int] = {}
    for rank, value in enumerate(sorted(values, reverse=True), 1):
        ranks.setdefault(value, rank)
    return [1 / (RANK_CONSTANT + ranks[value]) for value in values]


def _finite(score: Any, index: int) -> float:
    """Return a score as a float."""
    value = as_number(score)
    if not math.isfinite(value):
        msg = (
            f"first_stage_scores must be finite numbers, but passage {index} has {shown(score)}; leave out passages without a "
            "score, or use fusion='reciprocal_rank' without scores"
        )
        raise SettingsError(msg)
    return value
