"""`kalm eval`: reports as tables and as JSON."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from tools.command_line import Run, assert_fails


def test_eval_beir_prints_its_report(run: Run, model: Any, beir_folder: Path) -> None:
    """A line for BM25 and two for each ratio and codec, within 80 columns; the same figures as JSON."""
    options = ("--ratios", "2,8", "--codecs", "fp16,rot2", "--top-k", 3, "--seed", 1, "--measure", "RR", *model)
    lines = run("eval", "beir", beir_folder, *options).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    [printed] = json.loads(run("eval", "beir", beir_folder, "--json", *options).stdout)["collections"]
    assert (printed["n_queries"], printed["top_k"], printed["seed"]) == (2, 3, 1)
    _, _, *rows = lines
    expected = [
        "bm25",
        *(f"{name} {s}" for s in ("r2 fp16", "r2 rot2", "r8 fp16", "r8 rot2") for name in ("reranked", "+ bm25")),
    ]
    assert [system["name"] for system in printed["systems"]] == expected
    for row, system in zip(rows, printed["systems"], strict=True):
        assert row.startswith(f"{system['name']} ")
        assert f" {system['means']['RR']:.3f}" in row


def test_eval_beir_compares_models(run: Run, tiny_checkpoint: Path, beir_folder: Path) -> None:
    """Named by their folders, by whole paths where these are the same; run files have names of their own."""
    copies = [shutil.copytree(tiny_checkpoint, Path(name) / "model") for name in ("a", "b")]
    options = ("--ratios", "4", "--codecs", "rot4", "--top-k", 3)
    models = [part for model in (*copies, "pico") for part in ("--model", model)]
    [printed, _] = (run("eval", "beir", beir_folder, *options, *models, *ask) for ask in (("--json",), ("--runs", "runs")))
    figures = json.loads(printed.stdout)
    assert [(m["label"], m["model"]) for m in figures["models"]] == [(m, m) for m in ("a/model", "b/model", "pico")]
    assert (figures["model"], figures["fingerprint"]) == ("a/model", figures["models"][0]["fingerprint"])
    assert figures["models"][0]["fingerprint"] == figures["models"][1]["fingerprint"] != figures["models"][2]["fingerprint"]
    [collection] = figures["collections"]
    assert [(s["name"], s["model"]) for s in collection["systems"]] == [
        ("bm25", None),
        *((f"{m}{by} r4 rot4", m) for m in ("a/model", "b/model", "pico") for by in ("", " + bm25")),
    ]
    assert [s["to_first_model"] for s in collection["systems"][3:5]] == [{"mean": 0, "low": 0, "high": 0}] * 2
    assert len(list(Path("runs").iterdir())) == 7
    assert Path("runs/beir.a_model-plus-bm25-r4-rot4.trec").is_file()
    assert_fails(
        run("eval", "beir", beir_folder, *models, "--revision", "main"), "--revision: is of one --model, but there are 3"
    )
    assert_fails(run("eval", "beir", beir_folder, *models, "--model", "no/where"), "no/where")


@pytest.mark.parametrize(
    "command", [("eval", "beir"), ("eval", "fusion"), ("eval", "compression", "-o", "out", "--rounds", 1), ("calibrate",)]
)
def test_queries_that_a_run_lacks_can_be_left_out(run: Run, model: Any, beir_folder: Path, command: Any) -> None:
    """In all commands that take a run file; the error without the option names it."""
    Path("first.trec").write_text("q1 Q0 p1 1 2 t\nq1 Q0 p0 2 1 t\n")
    ask = (*command, beir_folder, "--first-stage", "first.trec", *model)
    assert_fails(run(*ask), "has no passage for 1 of 2, such as q0; leave them out with --skip-missing-queries")
    result = run(*ask, "--skip-missing-queries")
    assert "beir: left out 1 of 2 judged queries, which a run file lacks" in result.stderr
    if command[0] == "calibrate":
        assert "two queries at least, one to fit to and one to measure on, but got 1" in result.stderr
    else:
        assert result.exit_code == 0
        assert "1 queries" in result.stdout


def test_another_run_is_a_row(run: Run, model: Any, beir_folder: Path) -> None:
    Path("other.trec").write_text("q1 Q0 p3 1 2 t\n")
    options = ("--other-run", "other.trec", "--ratios", "4", "--top-k", 3, *model)
    assert_fails(run("eval", "beir", beir_folder, *options), "other.trec must be a run on beir for all judged queries")
    result = run("eval", "beir", beir_folder, *options, "--skip-missing-queries", "--json")
    [collection] = json.loads(result.stdout)["collections"]
    assert collection["n_queries"] == 1
    assert [s["name"] for s in collection["systems"]] == ["bm25", "other.trec", "reranked r4 rot4", "+ bm25 r4 rot4"]
    assert collection["systems"][1]["means"] == {"nDCG@10": 0}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "name one, such as --task SciFact, or a benchmark, such as --benchmark BEIR"),
        (("--task", "SciFacts"), "'SciFacts' not found. Did you mean: 'SciFact'?"),
    ],
)
def test_eval_mteb_says_what_to_name(run: Run, model: Any, names: tuple[str, ...], message: str) -> None:
    assert_fails(run("eval", "mteb", "-o", "out", *names, *model), message)
    assert not Path("out").exists()


def test_eval_compression_writes_its_figures(run: Run, model: Any, beir_folder: Path) -> None:
    """As JSON, the same as a table, and as a plot."""
    options = ("--ratios", "1,8", "--codecs", "int8", "--top-k", 3, "--rounds", 1, *model)
    printed = run("eval", "compression", beir_folder, "-o", "report", *options).stdout
    report = json.loads(Path("report/compression.json").read_text())
    [collection] = report["collections"]
    settings = [(cost["ratio"], cost["codec"]) for cost in collection["costs"]]
    assert settings == [(1, "fp32"), (1, "int8"), (8, "fp32"), (8, "int8")]
    assert all(f"| {ratio} | `{codec}` |" in printed for ratio, codec in settings)
    assert Path("report/compression.svg").read_text().startswith("<?xml")
    assert report["recommended"]["order"] is None
    assert "No setting is recommended: a recommendation needs 200 queries at least, but beir gives 2" in printed


@pytest.mark.parametrize(
    ("module", "message"), [("bm25s", "BM25 needs bm25s"), ("ir_measures", "evaluation needs ir-measures")]
)
def test_eval_names_the_missing_extra(
    run: Run, model: Any, beir_folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    result = run("eval", "beir", beir_folder, *model)
    assert_fails(result, f'{message}; install it with: pip install "kalm-integrations[eval]"')
