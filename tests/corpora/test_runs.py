"""Run files keep the order, and a bad line is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from kalm_integrations.corpora.runs import read_run, write_run
from kalm_integrations.errors import SettingsError


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    rankings = {"a": ["x", "y", "z"], "b": ["z"]}
    write_run(tmp_path / "run.trec", "a tag", rankings)
    assert {q: [i for i, _ in found] for q, found in read_run(tmp_path / "run.trec").items()} == rankings
    assert (tmp_path / "run.trec").read_text().splitlines()[1] == "a Q0 y 2 1 a_tag"
    assert [path.name for path in tmp_path.iterdir()] == ["run.trec"]


def test_scores_decide_the_order(tmp_path: Path) -> None:
    """Whatever the ranks say; of equal scores, the order of the file."""
    (tmp_path / "run").write_text("q Q0 a 1 1.5 t\nq Q0 b 2 2e3 t\nq Q0 c 3 1.5 t\n")
    assert read_run(tmp_path / "run") == {"q": [("b", 2000.0), ("a", 1.5), ("c", 1.5)]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q0 Q0 p0 1 2.5", r"run:1: a line of a run must be 'query Q0 passage rank score tag', but got 'q0 Q0 p0 1 2.5'"),
        ("q0 Q0 p0 1 nan t", "a score in a run must be a finite number, but got nan"),
        ("q0 Q0 p0 1 2 t\nq0 Q0 p0 2 1 t", r"run:2: .* p0 comes twice for q0"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "run"
    path.write_text(line)
    with pytest.raises(SettingsError, match=message):
        read_run(path)
