"""`kalm rerank`: the ranking it prints, and the encodings it uses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tools.command_line import QUERY, TEXTS, Run, write_jsonl

from kalm_integrations import EncodedPassage, KalmReranker
from kalm_integrations.core.settings import DEFAULT_CODEC


def test_rerank_prints_what_the_reranker_says(run: Run, model: Any, make_reranker: Callable[..., KalmReranker]) -> None:
    Path("passages.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    result = run("rerank", QUERY, "passages.txt", "--json", *model)
    expected = make_reranker(storage_codec=DEFAULT_CODEC).rank(QUERY, TEXTS)
    printed = json.loads(result.stdout)
    assert [(r["index"], r["score"], r["margin"]) for r in printed["results"]] == [
        (p.index, p.score, p.margin) for p in expected
    ]
    assert [r["row"]["text"] for r in printed["results"]] == [TEXTS[p.index] for p in expected]
    assert set(printed["results"][0]) == {"index", "score", "margin", "fused", "line", "row"}
    assert [r["line"] for r in printed["results"]] == [2 * p.index + 1 for p in expected]
    table = run("rerank", QUERY, "passages.txt", "--top-k", 2, *model).stdout.splitlines()
    assert len(table) == 3
    assert all(TEXTS[p.index] in line for p, line in zip(expected, table[1:], strict=False))


def test_rerank_passes_its_options_on(run: Run, model: Any, make_reranker: Callable[..., KalmReranker]) -> None:
    Path("p.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    expected = make_reranker(compression_ratio=8, storage_codec=DEFAULT_CODEC).rank(QUERY, TEXTS, instruction="Find a place.")
    threshold = expected[1].score
    options = ("--instruction", "Find a place.", "--ratio", 8, "--score-threshold", threshold)
    results = json.loads(run("rerank", QUERY, "p.txt", "--json", *options, *model).stdout)["results"]
    assert [(r["index"], r["score"]) for r in results] == [(p.index, p.score) for p in expected[:2]]


def test_rerank_with_spans(run: Run, model: Any, make_reranker: Callable[..., KalmReranker]) -> None:
    texts = ["It rained. Denver won Super Bowl 50.", "A wing stalls.", "naïve 東京"]
    Path("p.txt").write_text("\n".join(texts), encoding="utf-8")
    expected = make_reranker(storage_codec=DEFAULT_CODEC).rank(QUERY, texts, spans=2)
    results = json.loads(run("rerank", QUERY, "p.txt", "--json", "--spans", 2, *model).stdout)["results"]
    assert [result.get("spans") for result in results] == [
        None if passage.spans is None else [span.to_dict() for span in passage.spans] for passage in expected
    ]
    assert "spans" not in results[2]
    table = run("rerank", QUERY, "p.txt", "--spans", 3, *model).stdout.splitlines()
    for passage, line in zip(make_reranker(storage_codec=DEFAULT_CODEC).rank(QUERY, texts, spans=3), table[1:], strict=True):
        best = passage.spans[0]
        assert line.rstrip().endswith(f"  {texts[passage.index][best.start : best.end]}")


def test_rerank_of_nothing_is_nothing(run: Run, model: Any) -> None:
    result = run("rerank", QUERY, "--json", *model)
    assert (result.exit_code, json.loads(result.stdout)["results"]) == (0, [])
    assert run("rerank", QUERY, *model).stdout == ""


def test_rerank_uses_stored_encodings(
    run: Run, model: Any, make_reranker: Callable[..., KalmReranker], other_checkpoint: Path
) -> None:
    """Valid ones of this model and text are scored as they are; others are made anew; none is printed."""
    good, _, _, _ = make_reranker(storage_codec="rot2").encode_to_metadata(TEXTS)
    foreign = make_reranker(other_checkpoint).encode_to_metadata(TEXTS)[1]
    stored = [good, foreign, {"kalm_encoding": "kalm1.x.y"}, {"kalm_encoding": None}]
    rows = [{"_id": f"p{i}", "text": text, **metadata} for i, (text, metadata) in enumerate(zip(TEXTS, stored, strict=True))]
    write_jsonl(Path("p.jsonl"), rows)
    printed = json.loads(run("rerank", QUERY, "p.jsonl", "--json", *model).stdout)
    counts = {name: printed["stats"][name] for name in ("metadata_hits", "stale", "corrupt", "passages_encoded")}
    assert counts == {"metadata_hits": 1, "stale": 1, "corrupt": 1, "passages_encoded": 3}
    assert [set(r["row"]) for r in printed["results"]] == [{"_id", "text"}] * 4
    scores = {r["row"]["_id"]: r["score"] for r in printed["results"]}
    exact = make_reranker(storage_codec=DEFAULT_CODEC).score(QUERY, TEXTS)
    assert scores["p1"] == pytest.approx(exact[1], abs=1e-6)
    [coarse] = make_reranker().score(QUERY, [EncodedPassage.from_metadata(good["kalm_encoding"])])
    assert scores["p0"] == pytest.approx(coarse, abs=1e-6)
    assert coarse != pytest.approx(exact[0], abs=1e-5), "rot2 must show, or this test does not"
    result = run("rerank", QUERY, "p.jsonl", *model)
    assert "p0" in result.stdout
    assert "encodings: 1 stored ones used, 3 made now, 1 stale, 1 corrupt" in result.stderr


def test_table_has_no_control_characters(run: Run, model: Any) -> None:
    """A passage cannot send commands to the terminal."""
    result = run("rerank", QUERY, *model, stdin="a \x1b[2J \x07 b\n")
    assert "a  [2J   b" in result.stdout
    assert not set(result.stdout) & set("\x1b\x07")
