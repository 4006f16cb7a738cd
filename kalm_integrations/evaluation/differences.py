"""How far two orders differ: the mean difference of a measure with its interval, and Kendall's tau."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from kalm_integrations.corpora.measures import check_measures
from kalm_integrations.errors import MissingExtraError

N_RESAMPLES = 10_000
"""Bootstrap samples behind an interval."""

MAX_VALUES = 2**20
"""In memory at a time: ten thousand samples of ten thousand queries do not fit."""


@dataclass(frozen=True)
class Difference:
    """Mean difference of a measure over queries, with its 95 % interval (paired bootstrap)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the mean with its interval, as tables show it."""
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def check_comparable(measures: Sequence[str] = ("nDCG@10",)) -> None:
    """Check that there is what orders are compared with, before anything is scored.

    Raises:
        MissingExtraError: ir-measures or scipy is not installed.
        SettingsError: ir-measures does not know one of the measures, or there is none.
    """
    check_measures(measures)
    load_scipy("stats")


def mean_differences(differences: Sequence[Sequence[float]], seed: int = 0) -> list[Difference]:
    """Return the mean of each list, with the 95 % interval by resampling the queries (paired percentile bootstrap).

    Args:
        differences: lists over the same queries: of each query, one system's value minus another's. All of them are drawn
            from the same samples of the queries.
        seed: the same seed gives the same intervals.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    values = np.asarray(differences, dtype=np.float64)
    means = values.mean(axis=1)
    low = high = means
    # Of one query there is one sample.
    if values.shape[1] > 1:
        found = load_scipy("stats").bootstrap(
            (values,),
            np.mean,
            axis=1,
            method="percentile",
            n_resamples=N_RESAMPLES,
            batch=max(1, MAX_VALUES // values.size),
            rng=seed,
        )
        low, high = found.confidence_interval
    return [Difference(*map(float, ends)) for ends in zip(means, low, high, strict=True)]


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Return how far two scorers agree on the order of candidates, between -1 and 1 (tau-b, ties counted).

    One that orders nothing agrees with everything.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    tau = load_scipy("stats").kendalltau(first, second).statistic if len(first) > 1 else np.nan
    # Rounded, so that equal orders agree exactly.
    return 1.0 if np.isnan(tau) else round(float(tau), 12)


def load_scipy(name: str) -> Any:
    """Return a module of scipy.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    try:
        return import_module(f"scipy.{name}")
    except ImportError as error:
        msg = 'evaluation needs scipy; install it with: pip install "kalm-integrations[eval]"'
        raise MissingExtraError(msg) from error
