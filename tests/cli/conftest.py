"""The command line in an empty folder, the tiny checkpoint, and a small collection."""

from __future__ import annotations

from pathlib import Path

import pytest
from tools.command_line import TEXTS, Run, write_jsonl
from typer.testing import CliRunner, Result

from kalm_integrations.cli import app


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, stdin: str | bytes = "") -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, catch_exceptions=False)

    return run


@pytest.fixture
def model(tiny_checkpoint: Path) -> tuple[str, Path]:
    """The option that names the tiny checkpoint."""
    return ("--model", tiny_checkpoint)


@pytest.fixture
def beir_folder(tmp_path: Path) -> Path:
    """Four passages, two queries."""
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    write_jsonl(folder / "corpus.jsonl", [{"_id": f"p{i}", "text": text} for i, text in enumerate(TEXTS)])
    write_jsonl(folder / "queries.jsonl", [{"_id": "q0", "text": "super bowl"}, {"_id": "q1", "text": "drag of a wing"}])
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\tp2\t1\nq1\tp1\t1\n")
    return folder
