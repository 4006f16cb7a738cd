"""`kalm eval`: reports as tables and as JSON."""

from __future__ import annotations

import json
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


@pytest.mark.parametrize(
    ("module", "message"), [("bm25s", "BM25 needs bm25s"), ("ir_measures", "evaluation needs ir-measures")]
)
def test_eval_names_the_missing_extra(
    run: Run, model: Any, beir_folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    result = run("eval", "beir", beir_folder, *model)
    assert_fails(result, f'{message}; install it with: pip install "kalm-integrations[eval]"')
