"""Measures of a ranking, the interval of a difference, and the agreement of two orders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kalm_integrations.errors import MissingExtraError, SettingsError

N_RESAMPLES = 10_000
"""Bootstrap samples behind an interval."""


def ndcg_at_10(qrels: Mapping[str, Mapping[str, int]], rankings: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return the nDCG@10 of each query; see `measure`."""
    return measure(qrels, rankings, ["nDCG@10"])["nDCG@10"]


def measure(
    qrels: Mapping[str, Mapping[str, int]], rankings: Mapping[str, Sequence[str]], measures: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return measures of each query by ir-measures (trec_eval's definitions: the gain of nDCG is the grade).

    Args:
        qrels: query id -> passage id -> grade.
        rankings: query id -> passage ids, best first, without repetition.
        measures: names as ir-measures has them: nDCG@10, RR@10, R@100, AP.

    Returns:
        By measure, in order, and by query.

    Raises:
        MissingExtraError: ir-measures is not installed.
        SettingsError: it does not know a measure.
    """
    ir_measures = _ir_measures()
    parsed = {name: _parse(name) for name in check_measures(measures)}
    # trec_eval sorts by score and breaks ties by id; scores that fall by rank keep the order that was given.
    run = {query: {passage: -float(rank) for rank, passage in enumerate(ids)} for query, ids in rankings.items()}
    judged = {query: dict(qrels[query]) for query in rankings}
    values: dict[object, dict[str, float]] = {}
    for metric in ir_measures.iter_calc(list(parsed.values()), judged, run):
        values.setdefault(metric.measure, {})[metric.query_id] = float(metric.value)
    return {name: {query: values[metric][query] for query in rankings} for name, metric in parsed.items()}


def check_measures(measures: Sequence[str]) -> Sequence[str]:
    """Return measures if ir-measures knows all of them, and there is one.

    Raises:
        MissingExtraError: ir-measures is not installed.
        SettingsError: it does not know one.
    """
    if not measures:
        msg = "measures must name one at least, such as nDCG@10"
        raise SettingsError(msg)
    for name in measures:
        _parse(name)
    return measures


def _parse(name: str) -> Any:
    try:
        return _ir_measures().parse_measure(name)
    except (NameError, ValueError, SyntaxError) as error:
        msg = f"a measure must be one of ir-measures, such as nDCG@10, RR@10 or R@100, but got {name!r}"
        raise SettingsError(msg) from error


def _ir_measures() -> Any:
    try:
        import ir_measures
    except ImportError as error:
        msg = 'evaluation needs ir-measures; install it with: pip install "kalm-integrations[eval]"'
        raise MissingExtraError(msg) from error
    return ir_measures


def bootstrap_interval(differences: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of a mean difference, by resampling the queries (paired percentile bootstrap).

    Args:
        differences: of each query, one system's value minus the other's on the same query.
        seed: the same seed gives the same interval.
    """
    [interval] = bootstrap_intervals([differences], seed)
    return interval


def bootstrap_intervals(differences: Sequence[Sequence[float]], seed: int = 0) -> list[tuple[float, float]]:
    """Return `bootstrap_interval` of each of several lists over the same queries, from the same samples of them."""
    import numpy as np

    values = np.asarray(differences, dtype=np.float64).T
    random = np.random.default_rng(seed)
    # In blocks: ten thousand samples of ten thousand queries do not fit into memory at once.
    block = max(1, 2**20 // values.size)
    means = []
    for start in range(0, N_RESAMPLES, block):
        size = min(block, N_RESAMPLES - start)
        means.append(values[random.integers(len(values), size=(size, len(values)))].mean(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Return how far two scorers agree on the order of at least two candidates, between -1 and 1 (tau-b, ties counted)."""
    import numpy as np

    signs = [np.sign(np.subtract.outer(values, values)) for values in (np.asarray(first), np.asarray(second))]
    n_ordered = np.sqrt(np.abs(signs[0]).sum() * np.abs(signs[1]).sum())
    return float((signs[0] * signs[1]).sum() / n_ordered) if n_ordered else 1.0
