"""Intervals are those of a mean, orders agree as Kendall says, and tables show both alike."""

from __future__ import annotations

import math
import random
import statistics
import sys
import tracemalloc
from collections.abc import Callable

import pytest
from tools.corpora import draw_collection

from kalm_integrations import KalmReranker
from kalm_integrations.errors import MissingExtraError
from kalm_integrations.evaluation import differences
from kalm_integrations.evaluation.calibration import Judged, calibrate
from kalm_integrations.evaluation.compression import measure_costs
from kalm_integrations.evaluation.differences import Difference, kendall_tau, mean_differences
from kalm_integrations.evaluation.fusion import compare_fusions
from kalm_integrations.evaluation.report import evaluate

draw = random.Random(1)
GAINS = [draw.gauss(0.1, 0.5) for _ in range(400)]


def test_an_interval_is_that_of_a_mean() -> None:
    [found] = mean_differences([GAINS], seed=3)
    mean, error = statistics.fmean(GAINS), statistics.stdev(GAINS) / math.sqrt(400)
    assert found.mean == pytest.approx(mean)
    assert found.low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)
    assert mean_differences([[0.25] * 10]) == [Difference(0.25, 0.25, 0.25)]
    assert mean_differences([[0.3]]) == [Difference(0.3, 0.3, 0.3)], "of one query there is one sample"


def test_the_seed_decides_the_samples() -> None:
    assert mean_differences([GAINS], seed=3) == mean_differences([GAINS], seed=3) != mean_differences([GAINS], seed=4)


def test_lists_share_the_samples() -> None:
    """Whatever is added to every query of one list is added to its interval, and what is added to some is not."""
    first, shifted, constant = mean_differences([GAINS, [gain + 2 for gain in GAINS], [0.25] * 400])
    assert (shifted.low, shifted.high) == pytest.approx((first.low + 2, first.high + 2), abs=1e-9)
    assert constant == Difference(0.25, 0.25, 0.25)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """All samples of these queries at once would take 160 MB."""
    monkeypatch.setattr(differences, "MAX_VALUES", 2**16)
    mean_differences([[0.0, 1.0]])  # imports
    tracemalloc.start()
    mean_differences([GAINS * 5])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 2**20


def test_a_difference_reads_as_in_the_tables() -> None:
    assert str(Difference(0.0116, -0.0004, 0.0224)) == "+0.012 (-0.000 to +0.022)"


@pytest.mark.filterwarnings("error")
def test_kendall_tau() -> None:
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / (2 * 3) ** 0.5)
    assert kendall_tau([1, 1], [1, 2]) == 1, "nothing is ordered, so nothing is disputed"
    assert kendall_tau([1], [2]) == 1
    assert all(kendall_tau(GAINS[:n], GAINS[:n]) == 1 for n in range(2, 40)), "exactly, whatever the number"


@pytest.mark.parametrize("package", ["scipy.stats", "scipy.special"])
def test_missing_scipy_is_named_before_any_work(
    make_reranker: Callable[..., KalmReranker], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    reranker, collection = make_reranker(compression_ratio=1), draw_collection()
    settings = {"ratios": [1], "codecs": ["fp32"]}
    calls: list[Callable[[], object]] = [lambda: calibrate(reranker, [Judged("q", ["a", "b"], [True, False])] * 2)]
    if package == "scipy.stats":
        calls = [
            lambda: evaluate(reranker, collection, **settings),
            lambda: measure_costs(reranker, collection, **settings),
            lambda: compare_fusions(reranker, collection),
        ]
    for call in calls:
        with pytest.raises(MissingExtraError, match=r'evaluation needs scipy; .* pip install "kalm-integrations\[eval\]"'):
            call()
    assert reranker.stats.passages_encoded == 0
