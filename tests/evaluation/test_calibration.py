"""`kalm calibrate`: the fit, its measures on held-out queries, and where the calibration is written."""

from __future__ import annotations

import json
import math
import random
import shutil

import pytest
from typer.testing import CliRunner

from kalm_integrations import KalmReranker
from kalm_integrations.cli import app
from kalm_integrations.core.settings import Calibration
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.first_stage import Candidates
from kalm_integrations.errors import SettingsError
from kalm_integrations.evaluation.calibration import (
    UNCALIBRATED,
    Judged,
    calibrate,
    fit_calibration,
    judge_candidates,
    read_judged,
    save_calibration,
)
from kalm_integrations.evaluation.reliability import measure_reliability
from kalm_integrations.testing import FakeReranker


def draw_pairs(calibration: Calibration, n: int, seed: int = 0, scale: float = 4.0):
    """Margins, and labels as likely as the calibration says."""
    draw = random.Random(seed)
    margins = [draw.gauss(0, scale) for _ in range(n)]
    return margins, [draw.random() < 1 / (1 + math.exp(-calibration.apply(margin))) for margin in margins]


# --- the fit


@pytest.mark.parametrize(("temperature", "bias"), [(1.0, 0.0), (3.0, -2.0), (0.5, 1.0)])
@pytest.mark.parametrize("scale", [4.0, 400.0])
def test_the_fit_finds_what_the_labels_were_drawn_from(temperature, bias, scale):
    true = Calibration(temperature=temperature * scale / 4, bias=bias)
    fitted = fit_calibration(*draw_pairs(true, 20_000, scale=scale))
    assert fitted.temperature == pytest.approx(true.temperature, rel=0.05)
    assert fitted.bias == pytest.approx(true.bias, abs=0.1)


def test_the_fit_is_the_most_likely_one():
    """No calibration next to it makes the labels more likely, and the scores add up to the number of relevant pairs."""
    margins, labels = draw_pairs(Calibration(temperature=2.0, bias=-1.0), 300)
    best = fit_calibration(margins, labels)
    likelihood = measure_reliability(margins, labels, best).negative_log_likelihood
    for factor, shift in ((1.01, 0), (0.99, 0), (1, 0.01), (1, -0.01), (1.01, 0.01), (0.99, -0.01)):
        other = Calibration(temperature=best.temperature * factor, bias=best.bias + shift)
        assert measure_reliability(margins, labels, other).negative_log_likelihood > likelihood
    assert sum(1 / (1 + math.exp(-best.apply(m))) for m in margins) == pytest.approx(sum(labels), abs=1e-4)


def test_an_outlier_among_certain_pairs_does_not_stop_the_fit():
    margins = [-1000.0] * 500 + [1000.0] * 500 + [-1001.0]
    fitted = fit_calibration(margins, [False] * 500 + [True] * 501)
    assert 0 < fitted.temperature < math.inf


@pytest.mark.parametrize(
    ("margins", "labels", "message"),
    [
        ([1.0, 2.0], [True, True], "needs relevant and other pairs, but 2 of 2 are relevant"),
        ([1.0, 2.0], [False, False], "but 0 of 2 are relevant"),
        ([], [], "but 0 of 0 are relevant"),
        ([1.0, 2.0, 3.0], [False, True, True], "one margin parts them.*label more than 3 pairs"),
        ([1.0, 1.0, 1.0], [False, True, True], "one margin parts them"),
        ([3.0, 2.0, 1.0], [False, True, True], "here they have lower ones; check the labels"),
        ([5.0, 1.0, 4.0, 2.0, 3.0, 1.5], [False, True, False, True, True, False], "here they have lower ones"),
    ],
)
def test_labels_that_determine_no_calibration_are_refused(margins, labels, message):
    with pytest.raises(SettingsError, match=message):
        fit_calibration(margins, labels)


# --- the report


class Noisy(FakeReranker):
    """Its margins are overconfident: labels are drawn from a third of them."""

    def _margins(self, query, texts):
        draw = random.Random(query)
        return [draw.gauss(0, 6) for _ in texts]


def overconfident(n_queries: int = 400, n_passages: int = 20) -> list[Judged]:
    judged = []
    for i in range(n_queries):
        draw = random.Random(f"q{i}")
        margins = [draw.gauss(0, 6) for _ in range(n_passages)]
        labels = [random.Random(f"{i} {j}").random() < 1 / (1 + math.exp(-(m / 3 - 1))) for j, m in enumerate(margins)]
        judged.append(Judged(f"q{i}", [f"{i} {j}" for j in range(n_passages)], labels))
    return judged


def test_calibrating_helps_on_queries_that_were_not_fitted_to():
    report = calibrate(Noisy(), overconfident())
    for fitted in (report.calibration, report.half):
        assert (fitted.temperature, fitted.bias) == (pytest.approx(3, rel=0.1), pytest.approx(-1, abs=0.15))
    assert report.after.negative_log_likelihood < report.before.negative_log_likelihood - 0.1
    assert report.after.brier < report.before.brier
    assert report.after.calibration_error < 0.03 < report.before.calibration_error
    assert (report.n_queries, report.n_pairs) == (400, 8000)
    assert sum(b.n_pairs for b in report.after.bins) == 4000


def test_halves_are_of_queries_drawn_by_the_seed():
    judged = overconfident(40)
    reports = [calibrate(Noisy(), judged, seed=seed) for seed in (0, 0, 1)]
    assert reports[0] == reports[1]
    assert reports[0].half != reports[2].half
    # Summed in another order.
    assert reports[0].calibration.temperature == pytest.approx(reports[2].calibration.temperature)


def test_a_calibration_that_is_in_force_plays_no_part(make_reranker):
    judged = [Judged(f"who won in {i}?", ["the Panthers", "a wing", "lift", "Denver"], [i % 2, 1, 0, 1]) for i in range(6)]
    plain = calibrate(make_reranker(), judged)
    calibrated = calibrate(make_reranker(calibration={"temperature": 9.0, "bias": 3.0}), judged)
    assert calibrated.calibration.temperature == pytest.approx(plain.calibration.temperature, rel=1e-3)


def test_one_query_is_not_enough():
    with pytest.raises(SettingsError, match=r"two queries at least.* but got 1"):
        calibrate(FakeReranker(), [Judged("q", ["a", "b"], [True, False])])


def test_the_diagram_is_a_picture(tmp_path):
    report = calibrate(Noisy(), overconfident(40))
    report.save_diagram(tmp_path / "diagram.png")
    assert (tmp_path / "diagram.png").read_bytes().startswith(b"\x89PNG")
    report.save_diagram(tmp_path / "diagram.svg")
    assert "<svg" in (tmp_path / "diagram.svg").read_text()


# --- labelled pairs


def test_pairs_are_read_by_query(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"query": "q", "text": "a", "label": 1},
        {"query": "r", "text": "c", "label": True},
        {"query": "q", "title": "T", "text": "b", "label": 0},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_judged(path) == [Judged("q", ["a", "T b"], [True, False]), Judged("r", ["c"], [True])]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a", "label": 1},
        {"query": "q", "text": "a"},
        {"query": "q", "text": "a", "label": 0.5},
        {"query": 1, "label": 1},
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, row):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"query": "q", "text": "a", "label": 1}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(SettingsError, match=r"pairs.jsonl:2: a row must have a string as 'query' and 0, 1, false or true"):
        read_judged(path)


def test_candidates_are_labelled_by_grades_above_zero():
    collection = Collection("c", {"a": "A", "b": "B", "c": "C"}, {"q": "Q"}, {"q": {"a": 2, "b": 0}})
    judged = judge_candidates(collection, {"q": Candidates("Q", ["c", "b", "a"], [3.0, 2.0, 1.0])})
    assert judged == [Judged("Q", ["C", "B", "A"], [False, False, True])]


# --- saving


CALIBRATION = Calibration(temperature=2.0, bias=-0.5)


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def test_saving_keeps_the_other_fields_and_encodings_valid(checkpoint):
    (checkpoint / "kalm_reranker.json").write_text(json.dumps({"max_passage_tokens": 200, "note": "ours"}))
    before = KalmReranker.from_pretrained(checkpoint)
    fingerprint = before.fingerprint
    for calibration in (UNCALIBRATED, CALIBRATION):
        path = save_calibration(checkpoint, calibration)
    saved = {"max_passage_tokens": 200, "note": "ours", "calibration": {"temperature": 2.0, "bias": -0.5}}
    assert json.loads(path.read_text()) == saved
    after = KalmReranker.from_pretrained(checkpoint, calibration=True)
    assert (after.calibration, after.fingerprint) == (CALIBRATION, fingerprint)


@pytest.mark.parametrize("model", ["pico", "nano", "owner/name", "."])
def test_only_a_local_checkpoint_takes_a_calibration(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=r"folder of a local checkpoint, but got .*--output"):
        save_calibration(model, CALIBRATION)


@pytest.mark.parametrize(("content", "message"), [("{", "must be JSON"), ("[]", "must be a JSON object, but has type list")])
def test_a_file_that_is_not_understood_is_not_overwritten(checkpoint, content, message):
    path = checkpoint / "kalm_reranker.json"
    path.write_text(content)
    with pytest.raises(SettingsError, match=message):
        save_calibration(checkpoint, CALIBRATION)
    assert path.read_text() == content


# --- the command


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    texts = ["the Panthers", "a wing", "lift", "Denver"]
    rows = [{"query": f"who won in {i}?", "text": t, "label": (i + j) % 2} for i in range(8) for j, t in enumerate(texts)]
    # Labels at random would be refused where they go against the model; these follow the margins loosely.
    return path, rows


def test_the_command_fits_saves_and_draws(checkpoint, pairs, tmp_path):
    path, rows = pairs
    reranker = KalmReranker.from_pretrained(checkpoint)
    margins = {p.index: p.margin for p in reranker.rank(rows[0]["query"], [row["text"] for row in rows[:4]])}
    middle = sorted(margins.values())[1]
    for i, row in enumerate(rows):
        row["label"] = int((margins[i % 4] > middle) != (i % 7 == 0))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ask = ["calibrate", str(path), "--model", str(checkpoint)]
    outputs = ["--output", str(tmp_path / "calibration.json"), "--diagram", str(tmp_path / "diagram.svg")]
    result = CliRunner().invoke(app, [*ask, *outputs, "--save"])
    assert result.exit_code == 0, result.output
    assert "8 queries, 32 pairs" in result.stdout
    values = json.loads((tmp_path / "calibration.json").read_text())
    opened = KalmReranker.from_pretrained(checkpoint, calibration=True)
    assert opened.calibration == KalmReranker.from_pretrained(checkpoint, calibration=values).calibration
    facts = CliRunner().invoke(app, ["info", "--model", str(checkpoint), "--json"]).stdout
    assert json.loads(facts)["calibration"] == values
    assert (tmp_path / "diagram.svg").is_file()
    printed = json.loads(CliRunner().invoke(app, [*ask, "--json"]).stdout)
    assert printed["calibration"] == values
    assert printed["before"]["negative_log_likelihood"] > 0


def test_the_command_says_before_any_work_that_it_cannot_save(pairs):
    path, rows = pairs
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = CliRunner().invoke(app, ["calibrate", str(path), "--model", "pico", "--save"])
    assert result.exit_code == 2
    assert "folder of a local checkpoint, but got 'pico'" in result.stderr
