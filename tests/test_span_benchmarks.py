"""The programs that measure spans and batches, at toy size, and the pages that show what they found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from benchmarks import batches, span_cost, spans, spans_page
from benchmarks.span_cases import Case, answered, joined, sample
from benchmarks.span_cost import POOLED, PREFIX, SPANS

TEXT = "Otters live on fish. They sleep in dens. They hunt at night."
RANGES = [(0, 20), (21, 40), (41, 60)]


def write(folder: Path, name: str, rows: list[dict[str, object]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_cases_are_read_with_their_answers(tmp_path):
    write(tmp_path, "corpus.jsonl", [{"_id": "p", "text": TEXT}])
    write(tmp_path, "queries.jsonl", [{"_id": "q", "text": "Where do otters sleep?"}])
    write(tmp_path, "answers.jsonl", [{"_id": "q", "passage": "p", "answers": [[35, 39], [32, 39]]}])
    [case] = answered(tmp_path)
    assert case == Case("Where do otters sleep?", TEXT, ((35, 39), (32, 39)))
    assert [case.is_answer(*place) for place in RANGES] == [False, True, False]


def test_sections_of_one_title_become_a_document_of_which_one_answers(tmp_path):
    sections = {"a": "Otters live on fish.", "b": "They sleep in dens.", "c": "They hunt at night.", "d": "Alone."}
    rows = [{"_id": key, "title": "Alone" if key == "d" else "Otters", "text": text} for key, text in sections.items()]
    write(tmp_path, "corpus.jsonl", rows)
    write(tmp_path, "queries.jsonl", [{"_id": f"q{key}", "text": f"question {key}"} for key in sections])
    write(tmp_path / "qrels", "unused", [])
    (tmp_path / "qrels" / "train.tsv").write_text(
        "query\tpassage\tscore\n" + "".join(f"q{key}\t{key}\t1\n" for key in sections)
    )
    cases = joined(tmp_path)
    assert {case.text for case in cases} == {cases[0].text}
    assert sorted(cases[0].text.split("\n\n")) == sorted(text for key, text in sections.items() if key != "d")
    found = {case.question: case.text[slice(*case.answers[0])] for case in cases}
    assert found == {f"question {key}": sections[key] for key in "abc"}
    assert sample(cases, 2) == sample(cases, 2)


def test_a_method_is_worth_what_it_finds_and_what_it_lets_go():
    cases = [Case("?", TEXT, ((35, 39),))] * 20
    right = [np.array([0.0, 2.0, 1.0])] * 20
    assert spans.outcome(cases, [RANGES] * 20, right, spans.difference)["hit"] == 1
    assert spans.outcome(cases, [RANGES] * 20, right, spans.difference)["removed"] == pytest.approx(1 - 19 / 58)
    # Two of twenty find it 1.5 and 3 below the best: at 95 % the nearer one has to stay.
    rows = [*right[2:], np.array([0.0, -1.5, -9.0]), np.array([0.0, -3.0, -9.0])]
    found = spans.outcome(cases, [RANGES] * 20, rows, spans.difference)
    assert found["hit"] == 0.9
    assert found["bar"] == -1.5
    kept = 18 * (19 + 19) + (20 + 19) + 20
    assert found["removed"] == pytest.approx(1 - kept / (20 * 58))
    assert list(spans.share(np.array([1.0, 4.0]))) == [0.25, 1.0]


def test_costs_and_batches_are_measured(tmp_path):
    toy = ["--shape", "toy", "--passages", "3", "--rounds", "1", "--output"]
    span_cost.main([*toy, str(tmp_path / "span_cost.json"), "--sentences", "2", "--tokens", "24"])
    rows = json.loads((tmp_path / "span_cost.json").read_text())["rows"]
    assert [(row["dtype"], row["sentences"]) for row in rows] == [("float32", 6), ("bfloat16", 6)]
    assert all(row["wall"].keys() == {POOLED, PREFIX, SPANS} for row in rows)
    small = ["--device", "cpu", "--tokens", "12", "--sizes", "2", "--dtypes", "float32"]
    batches.main([*toy, str(tmp_path / "batches.json"), *small])
    [row] = json.loads((tmp_path / "batches.json").read_text())["rows"]
    assert (row["size"], len(row["encode"]), len(row["score"])) == (2, 1, 1)


@pytest.mark.parametrize("page", spans_page.PAGES, ids=lambda page: page.name)
def test_the_pages_show_what_was_measured(page):
    assert spans_page.updated(page) == page.read_text(encoding="utf-8")
