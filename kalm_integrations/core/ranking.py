"""From scores to a ranking: the rules that every reranker follows. Pure functions, without torch."""

from __future__ import annotations

from collections.abc import Sequence

from kalm_integrations.core.types import RankedPassage
from kalm_integrations.errors import SettingsError


def check_cut(top_k: int | None, score_threshold: float | None) -> None:
    """Check what a ranking is cut by.

    Raises:
        SettingsError: `top_k` is not positive, or `score_threshold` is no number.
    """
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        msg = f"top_k must be a positive whole number or None, but got {top_k!r}"
        raise SettingsError(msg)
    # A threshold that is NaN does not equal itself, and would leave out everything.
    if score_threshold is not None and not (isinstance(score_threshold, (int, float)) and score_threshold == score_threshold):
        msg = f"score_threshold must be a number or None, but got {score_threshold!r}"
        raise SettingsError(msg)


def best_first(
    scores: Sequence[float],
    margins: Sequence[float],
    top_k: int | None,
    score_threshold: float | None,
    fused: Sequence[float] | None = None,
) -> list[RankedPassage]:
    """Return passages by falling margin, which keeps apart what rounds to the same score; ties keep their order.

    With `fused` values these decide, and the margin between equal ones. Passages that score less than `score_threshold` are
    left out before the list is cut to `top_k`.
    """
    ranked = [
        RankedPassage(index, score, margin, None if fused is None else fused[index])
        for index, (score, margin) in enumerate(zip(scores, margins, strict=True))
    ]
    ranked.sort(key=lambda passage: (-(passage.fused or 0.0), -passage.margin))
    if score_threshold is not None:
        ranked = [passage for passage in ranked if passage.score >= score_threshold]
    return ranked[:top_k]
