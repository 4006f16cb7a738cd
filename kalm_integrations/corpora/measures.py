"""Measures of a ranking, by ir-measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kalm_integrations.errors import MissingExtraError, SettingsError


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
