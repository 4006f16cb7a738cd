"""Calibration: scores become probabilities, off unless asked for, and nothing else changes."""

from __future__ import annotations

import json
import math
import shutil

import pytest

from kalm_integrations import KalmReranker
from kalm_integrations.core.settings import Calibration
from kalm_integrations.errors import InvalidCheckpointError, SettingsError

QUERY = "who won the super bowl?"
PASSAGES = ["The Panthers won.", "Lift and drag of a slender wing.", "Super Bowl 50 was played in 2015.", "a"]
CALIBRATION = {"temperature": 2.5, "bias": -1.25}


@pytest.fixture
def calibrated_checkpoint(tiny_checkpoint, tmp_path):
    """A copy of the tiny checkpoint that carries a calibration."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "calibrated")
    (folder / "kalm_reranker.json").write_text(json.dumps({"calibration": CALIBRATION}))
    return folder


# --- applying


def test_score_is_the_sigmoid_of_the_calibrated_margin_and_the_margin_stays(make_reranker):
    plain = make_reranker().rank(QUERY, PASSAGES)
    reranker = make_reranker(calibration=CALIBRATION)
    ranked = reranker.rank(QUERY, PASSAGES)
    assert [p.index for p in ranked] == [p.index for p in plain]
    assert [p.margin for p in ranked] == pytest.approx([p.margin for p in plain], abs=1e-5)
    expected = [1 / (1 + math.exp(-(p.margin / 2.5 - 1.25))) for p in ranked]
    assert [p.score for p in ranked] == pytest.approx(expected, abs=1e-6)
    assert reranker.score(QUERY, [PASSAGES[p.index] for p in ranked]) == pytest.approx(expected, abs=1e-6)


def test_the_threshold_is_one_of_calibrated_scores(make_reranker):
    reranker = make_reranker(calibration=CALIBRATION)
    scores = [p.score for p in reranker.rank(QUERY, PASSAGES)]
    kept = reranker.rank(QUERY, PASSAGES, score_threshold=(scores[1] + scores[2]) / 2)
    assert [p.score for p in kept] == pytest.approx(scores[:2], abs=1e-6)


@pytest.mark.parametrize("margin", [-1e308, -50.0, 0.0, 50.0, 1e308])
@pytest.mark.parametrize("temperature", [1e-300, 1.0, 1e300])
def test_extreme_values_give_probabilities(make_reranker, margin, temperature):
    reranker = make_reranker(calibration={"temperature": temperature, "bias": 1.0})
    assert 0 <= reranker._ranker._scores([margin])[0] <= 1


# --- where it comes from


def test_the_checkpoint_s_calibration_is_used_by_who_asks_for_it(make_reranker, calibrated_checkpoint):
    given = make_reranker(calibration=CALIBRATION)
    assert (
        make_reranker(calibrated_checkpoint, calibration=True).calibration == given.calibration == Calibration(**CALIBRATION)
    )
    for off in (None, False):
        reranker = make_reranker(calibrated_checkpoint, calibration=off)
        assert reranker.calibration is None
        assert reranker.score(QUERY, PASSAGES) == pytest.approx(make_reranker().score(QUERY, PASSAGES), abs=1e-6)
    other = {"temperature": 1.0, "bias": 0.0}
    assert make_reranker(calibrated_checkpoint, calibration=other).calibration == Calibration(**other)


def test_encodings_outlive_a_calibration(tiny_checkpoint, make_reranker, tmp_path):
    """Its file is no part of what the checkpoint is: encodings made before are read after, by whoever is calibrated."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    before = make_reranker(folder)
    encodings = before.encode_passages(PASSAGES)
    (folder / "kalm_reranker.json").write_text(json.dumps({"calibration": CALIBRATION}))
    after = make_reranker(folder, calibration=True)
    assert after.fingerprint == before.fingerprint == make_reranker(folder).fingerprint
    assert after.runtime.checkpoint.identity == before.runtime.checkpoint.identity
    assert len(after.rank(QUERY, encodings)) == len(PASSAGES)
    assert after.stats.passages_encoded == 0


# --- what is refused


def test_a_checkpoint_without_one_is_refused_with_the_remedy(tiny_checkpoint):
    message = (
        r"calibration=True needs one in the checkpoint's kalm_reranker.json, but .* has none; make one with kalm calibrate"
    )
    with pytest.raises(SettingsError, match=message):
        KalmReranker.from_pretrained(tiny_checkpoint, calibration=True)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ({"temperature": 0, "bias": 0}, "temperature: Input should be greater than 0, but got 0"),
        ({"temperature": -1.0, "bias": 0}, "temperature: Input should be greater than 0"),
        ({"temperature": math.inf, "bias": 0}, "temperature: Input should be a finite number"),
        ({"temperature": 1.0, "bias": math.nan}, "bias: Input should be a finite number"),
        ({"temperature": 1.0}, "bias: Field required"),
        ({"temperature": 1.0, "bias": 0.0, "scale": 2}, "scale: Extra inputs are not permitted"),
        ({"temperature": "2", "bias": 0.0}, "temperature: Input should be a valid number"),
        ("checkpoint", "calibration.*valid boolean, but got 'checkpoint'"),
        (1, "calibration.*valid boolean, but got 1"),
    ],
)
def test_bad_values_are_refused_before_any_work(calibration, message):
    with pytest.raises(SettingsError, match=message):
        KalmReranker.from_pretrained("no/such-checkpoint", calibration=calibration)


def test_a_bad_calibration_in_a_checkpoint_is_refused(calibrated_checkpoint):
    (calibrated_checkpoint / "kalm_reranker.json").write_text(json.dumps({"calibration": {"temperature": -2, "bias": 0}}))
    with pytest.raises(InvalidCheckpointError, match=r"kalm_reranker.json is not valid.*(\n.*)*temperature"):
        KalmReranker.from_pretrained(calibrated_checkpoint)
