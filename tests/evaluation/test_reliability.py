"""Measures of reliability have the book's values, and the diagram shows how sure each share is."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from kalm_integrations.core.settings import Calibration
from kalm_integrations.evaluation.plots import plot_reliability
from kalm_integrations.evaluation.reliability import measure_reliability

PLAIN = Calibration(temperature=1.0, bias=0.0)


def test_measures_have_the_book_s_values():
    logit = math.log(3)  # P = 0.75
    measured = measure_reliability([logit] * 4 + [-logit] * 4, [1, 1, 1, 0, 1, 1, 0, 0], PLAIN)
    assert measured.negative_log_likelihood == pytest.approx((5 * -math.log(0.75) + 3 * -math.log(0.25)) / 8)
    assert measured.brier == pytest.approx((5 * 0.25**2 + 3 * 0.75**2) / 8)
    assert [(b.n_pairs, b.mean_score, b.share_relevant) for b in measured.bins] == [
        (4, pytest.approx(0.25), 0.5),
        (4, pytest.approx(0.75), 0.75),
    ]
    assert measured.calibration_error == pytest.approx(0.5 * 0.25)


def test_scores_of_one_and_margins_of_any_size_are_measured():
    measured = measure_reliability([1e6, -1e6], [True, False], PLAIN)
    assert (measured.brier, measured.calibration_error, measured.negative_log_likelihood) == (0, 0, 0)
    assert np.isfinite(measure_reliability([1e6], [False], PLAIN).negative_log_likelihood)


def test_a_share_has_wilson_s_interval():
    """Never empty, not even where all pairs are alike; the more pairs, the narrower."""
    [found] = measure_reliability([0.5] * 10, [True] * 2 + [False] * 8, PLAIN).bins
    # The example of many textbooks: 2 of 10.
    assert (found.low, found.high) == pytest.approx((0.0567, 0.5098), abs=1e-4)
    [few] = measure_reliability([0.5] * 3, [True] * 3, PLAIN).bins
    [many] = measure_reliability([0.5] * 300, [True] * 300, PLAIN).bins
    assert 0.4 < few.low < 0.5 < 0.98 < many.low < many.high == few.high == 1


def test_the_diagram_shows_intervals_and_sizes(tmp_path: Path):
    """Also of a bin with one pair; the same figures give the same file, and nothing is black or white."""
    margins = [*np.linspace(-5, 2, 200), 4.0]
    labels = [i % 3 == 0 for i in range(200)] + [True]
    measured = {"plain": measure_reliability(margins, labels, PLAIN)}
    measured["calibrated"] = measure_reliability(margins, labels, Calibration(temperature=2.0, bias=-0.5))
    for name in ("a.svg", "b.svg"):
        plot_reliability(measured, tmp_path / name)
    svg = (tmp_path / "a.svg").read_text()
    assert svg == (tmp_path / "b.svg").read_text()
    for text in (
        "95 % interval",
        "pairs in the bin",
        *(f"{n} (error {m.calibration_error:.3f})" for n, m in measured.items()),
    ):
        assert text in svg
    assert not {"#000000", "#ffffff"} & set(svg.replace(";", " ").replace('"', " ").split())
