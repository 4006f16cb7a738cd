"""Measures of a ranking: nDCG@10, the interval of a difference, and the agreement of two orders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kalm_integrations.errors import MissingExtraError

N_RESAMPLES = 10_000
"""Bootstrap samples behind an interval."""


def ndcg_at_10(qrels: Mapping[str, Mapping[str, int]], rankings: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return the nDCG@10 of each query, by ir-measures (trec_eval's definition: gain = grade).

    Args:
        qrels: query id -> passage id -> grade.
        rankings: query id -> passage ids, best first, without repetition.

    Raises:
        MissingExtraError: ir-measures is not installed.
    """
    try:
        import ir_measures
    except ImportError as error:
        msg = 'evaluation needs ir-measures; install it with: pip install "kalm-integrations[eval]"'
        raise MissingExtraError(msg) from error
    # trec_eval sorts by score and breaks ties by id; scores that fall by rank keep the order that was given.
    run = {query: {passage: -float(rank) for rank, passage in enumerate(ids)} for query, ids in rankings.items()}
    judged = {query: dict(qrels[query]) for query in rankings}
    measured = ir_measures.iter_calc([ir_measures.nDCG @ 10], judged, run)
    values = {metric.query_id: float(metric.value) for metric in measured}
    return {query: values[query] for query in rankings}


def bootstrap_interval(differences: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of a mean difference, by resampling the queries (paired percentile bootstrap).

    Args:
        differences: of each query, one system's value minus the other's on the same query.
        seed: the same seed gives the same interval.
    """
    import numpy as np

    values = np.asarray(differences, dtype=np.float64)
    random = np.random.default_rng(seed)
    # In blocks: ten thousand samples of ten thousand queries do not fit into memory at once.
    block = max(1, 2**20 // len(values))
    sizes = [min(block, N_RESAMPLES - start) for start in range(0, N_RESAMPLES, block)]
    means = [values[random.integers(len(values), size=(size, len(values)))].mean(axis=1) for size in sizes]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Return how far two scorers agree on the order of at least two candidates, between -1 and 1 (tau-b, ties counted)."""
    import numpy as np

    signs = [np.sign(np.subtract.outer(values, values)) for values in (np.asarray(first), np.asarray(second))]
    n_ordered = np.sqrt(np.abs(signs[0]).sum() * np.abs(signs[1]).sum())
    return float((signs[0] * signs[1]).sum() / n_ordered) if n_ordered else 1.0
