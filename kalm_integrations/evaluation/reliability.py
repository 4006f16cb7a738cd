"""How far scores are from probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kalm_integrations.core.settings import Calibration
from kalm_integrations.evaluation.differences import load_scipy

N_BINS = 10
"""Bins of equal width that scores are sorted into, for the calibration error and the diagram."""


@dataclass(frozen=True)
class Bin:
    """The pairs whose score lies in one range."""

    n_pairs: int
    mean_score: float
    share_relevant: float
    low: float
    """Of the share's 95 % interval (Wilson's, which takes the pairs for independent)."""
    high: float


@dataclass(frozen=True)
class Reliability:
    """How far scores are from probabilities; of each number less is better."""

    negative_log_likelihood: float
    """Mean over the pairs, in nats."""
    brier: float
    """Mean squared difference between the score and the label."""
    calibration_error: float
    """Difference between mean score and share of relevant pairs in a bin, mean over the pairs."""
    bins: tuple[Bin, ...]
    """Those that are not empty, by rising score."""


def measure_reliability(margins: Sequence[float], is_relevant: Sequence[bool], calibration: Calibration) -> Reliability:
    """Return how far calibrated scores are from probabilities.

    Args:
        margins: of at least one pair.
        is_relevant: their labels.
        calibration: makes scores of the margins.
    """
    logits = np.array([calibration.apply(margin) for margin in margins], dtype=np.float64)
    labels = np.asarray(is_relevant, dtype=np.float64)
    scores = load_scipy("special").expit(logits)
    places = np.minimum((scores * N_BINS).astype(int), N_BINS - 1)
    groups = [places == place for place in range(N_BINS) if (places == place).any()]
    bins = tuple(_bin(scores[group], labels[group]) for group in groups)
    return Reliability(
        negative_log_likelihood=float(np.logaddexp(0, (1 - 2 * labels) * logits).mean()),
        brier=float(((scores - labels) ** 2).mean()),
        calibration_error=sum(b.n_pairs * abs(b.mean_score - b.share_relevant) for b in bins) / len(labels),
        bins=bins,
    )


def _bin(scores: np.ndarray, labels: np.ndarray) -> Bin:
    test = load_scipy("stats").binomtest(int(labels.sum()), len(labels))
    low, high = test.proportion_ci(method="wilson")
    return Bin(len(labels), float(scores.mean()), float(labels.mean()), float(low), float(high))
