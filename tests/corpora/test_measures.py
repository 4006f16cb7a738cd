"""Measures have trec_eval's values, of the order that is given."""

from __future__ import annotations

import math
import sys

import pytest

from kalm_integrations.corpora.measures import check_measures, measure, ndcg_at_10
from kalm_integrations.errors import MissingExtraError, SettingsError


def test_ndcg_has_the_book_s_values() -> None:
    """Gain = grade, discount = log2(rank + 1), by the order that is given, and relevant passages not found count."""
    qrels = {"a": {"x": 1}, "b": {"x": 2, "y": 1, "z": 0}, "c": {"x": 1}, "d": {"x": 1}, "unused": {"x": 1}}
    rankings = {"a": ["z", "x"], "b": ["z", "y", "x"], "c": ["z", "y"], "d": [*map(str, range(10)), "x"]}
    values = ndcg_at_10(qrels, rankings)
    second = 1 / math.log2(3)
    assert list(values) == list(rankings)
    assert values["a"] == pytest.approx(second)
    assert values["b"] == pytest.approx((second + 2 / math.log2(4)) / (2 + second))
    assert (values["c"], values["d"]) == (0, 0)


def test_measures_are_those_asked_for() -> None:
    """By name and query; the first relevant passage at rank 2 of 3."""
    values = measure({"q": {"x": 1, "y": 1}}, {"q": ["z", "x", "w"]}, ["RR@10", "R@3", "P@2"])
    assert values == {"RR@10": {"q": 0.5}, "R@3": {"q": 0.5}, "P@2": {"q": 0.5}}


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        ([], "measures must name one at least"),
        (["RR", "nDCG@ten"], "a measure must be one of ir-measures, .* but got 'nDCG@ten'"),
    ],
)
def test_unknown_measures_are_named(measures: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        check_measures(measures)


def test_missing_ir_measures_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ir_measures", None)
    with pytest.raises(MissingExtraError, match=r'pip install "kalm-integrations\[eval\]"'):
        check_measures(["RR"])
