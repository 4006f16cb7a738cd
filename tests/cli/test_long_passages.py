"""Commands on passages that are longer than the model's limit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tools.command_line import QUERY, TEXTS, Run, assert_fails, read_jsonl, write_jsonl

from kalm_integrations import EncodedPassage, KalmReranker
from kalm_integrations.planning.plans import make_plan

LIMIT = 64
LONG = " ".join(f"{text} Sentence {number}." for number in range(12) for text in TEXTS)
OPTIONS: list[tuple[str, ...]] = [(), ("--long-passages", "cut"), ("--max-windows", "2")]


@pytest.fixture
def short_model(tiny_checkpoint: Path, tmp_path: Path) -> tuple[str, Path]:
    """The option that names the tiny checkpoint with a limit of its own."""
    folder = tmp_path / "limited"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "kalm_reranker.json").write_text(json.dumps({"max_passage_tokens": LIMIT}))
    return ("--model", folder)


@pytest.fixture
def rows() -> Path:
    return write_jsonl(Path("p.jsonl"), [{"_id": "short", "text": TEXTS[0]}, {"_id": "long", "text": LONG}])


@pytest.fixture
def make_short(make_reranker: Callable[..., KalmReranker], short_model: Any) -> Callable[..., KalmReranker]:
    return lambda **settings: make_reranker(short_model[1], storage_codec="rot4", **settings)


def test_encode_says_what_is_in_windows_and_what_is_not_read(
    run: Run, short_model: Any, rows: Path, make_short: Callable[..., KalmReranker]
) -> None:
    counts = ("1 of them in windows, 0 not", "0 of them in windows, 1 not", "1 of them in windows, 1 not")
    settings: list[dict[str, Any]] = [{}, {"long_passages": "cut"}, {"max_windows": 2}]
    for options, said, given in zip(OPTIONS, counts, settings, strict=True):
        result = run("encode", rows, *short_model, *options)
        assert f"2 passages encoded, {said} read to the end" in result.stderr
        found = [{name: row[name] for name in ("kalm_encoding", "kalm_fp")} for row in read_jsonl(result.stdout)]
        assert found == make_short(**given).encode_to_metadata([TEXTS[0], LONG])
    assert_fails(run("encode", rows, *short_model, "--long-passages", "fold"), "long_passages")
    assert_fails(run("encode", rows, *short_model, "--max-windows", 0), "max_windows")


def test_a_text_of_2_mb_takes_no_more_windows_than_it_may(run: Run, short_model: Any) -> None:
    """It is counted, and said."""
    text = "A word and another. " * 100_000
    result = run("encode", *short_model, "--max-windows", 3, stdin=json.dumps({"text": text}))
    assert "1 passages encoded, 1 of them in windows, 1 not read to the end" in result.stderr
    [row] = read_jsonl(result.stdout)
    encoding = EncodedPassage.from_metadata(row["kalm_encoding"])
    assert len(encoding.windows or ()) == 3
    assert encoding.n_tokens <= 3 * LIMIT
    assert row["kalm_fp"] == encoding.fingerprint


def test_inspect_counts_windows(run: Run, short_model: Any, rows: Path, make_short: Callable[..., KalmReranker]) -> None:
    """Also of two passages of as many tokens, one of which is in windows; lengths are those of real strings."""
    run("encode", rows, "-o", "e.jsonl", *short_model, "--ratio", 4)
    encodings = [EncodedPassage.from_metadata(row["kalm_encoding"]) for row in read_jsonl(Path("e.jsonl").read_text())]
    n_windows = len(encodings[1].windows or ())
    assert n_windows > 2
    printed = json.loads(run("inspect", "e.jsonl", "--json").stdout)
    assert (printed["encodings"], printed["in_windows"], printed["windows"]) == (2, 1, n_windows)
    for ratio in (4, 16, 128):
        lengths = [encoding.pool(ratio).metadata_length() for encoding in encodings]
        assert printed["lengths"][str(ratio)]["rot4"] == sum(lengths) / 2
    assert f"in windows   1, of {n_windows:,} windows" in run("inspect", "e.jsonl").stdout
    [whole] = make_short(max_passage_tokens=1024).encode_passages([LONG])
    one, *_ = encodings[1].windows or ()
    assert whole.n_tokens > one.n_tokens
    lines = f"{encodings[1].to_metadata()}\n{whole.to_metadata()}"
    both = json.loads(run("inspect", "--json", stdin=lines).stdout)
    assert (
        both["lengths"]["32"]["fp16"]
        == sum(json.loads(run("inspect", "--json", line).stdout)["lengths"]["32"]["fp16"] for line in lines.split()) / 2
    )


def test_rerank_says_which_window_it_was(
    run: Run, short_model: Any, rows: Path, make_short: Callable[..., KalmReranker]
) -> None:
    """In the table, where its text is shown, and in JSON; none for what was read in one piece."""
    ranked = {passage.index: passage for passage in make_short().rank(QUERY, [TEXTS[0], LONG], spans=2)}
    start, end = ranked[1].window or (0, 0)
    assert end - start < len(LONG)
    for spans in ((), ("--spans", 2)):
        printed = json.loads(run("rerank", QUERY, rows, *short_model, *spans, "--json").stdout)
        found = {result["row"]["_id"]: result for result in printed["results"]}
        assert found["long"]["window"] == {"start": start, "end": end}
        assert "window" not in found["short"]
    result = run("rerank", QUERY, rows, *short_model)
    assert f"{start:,}-{end:,}" in result.stdout
    assert LONG[start : start + 12] in result.stdout
    assert "2 made now, 1 of these in windows" in result.stderr
    cut = run("rerank", QUERY, rows, *short_model, "--long-passages", "cut")
    assert "window" not in cut.stdout
    assert "1 of these not read to the end" in cut.stderr


def test_explain_shows_the_window(run: Run, short_model: Any, rows: Path, make_short: Callable[..., KalmReranker]) -> None:
    """And says of the rest that it is outside, but of a cut passage that it is not read."""
    ranked = {passage.index: passage for passage in make_short().rank(QUERY, [TEXTS[0], LONG])}
    start, end = ranked[1].window or (0, 0)
    place = f"est window: characters {start:,} to {end:,} of {len(LONG):,}"
    shown = " ".join(run("explain", QUERY, rows, *short_model).stdout.split())
    assert f"b{place}" in shown
    assert "outside" in shown
    assert "not read" not in shown
    page = run("explain", QUERY, rows, *short_model, "--html", "-").stdout
    assert f"B{place}." in page
    assert "[outside:]" in page
    assert "[not read:]" not in page
    printed = json.loads(run("explain", QUERY, rows, *short_model, "--json").stdout)
    assert {"start": start, "end": end} in [result.get("window") for result in printed["results"]]
    cut = run("explain", QUERY, rows, *short_model, "--long-passages", "cut").stdout
    assert "best window" not in cut
    assert "not read" in cut


def test_evaluation_takes_the_way(run: Run, short_model: Any, beir_folder: Path) -> None:
    """Cut and windows have one fingerprint for short passages, and results say which it was."""
    for command in (("eval", "beir", "--ratios", 4), ("eval", "fusion")):
        windows, cut, few = (
            json.loads(run(*command, beir_folder, *short_model, *options, "--json").stdout) for options in OPTIONS
        )
        assert windows["fingerprint"] == cut["fingerprint"] == few["fingerprint"]
        assert cut["windows_fingerprint"] is None
        assert windows["windows_fingerprint"] != few["windows_fingerprint"]
    options = ("--queries", 2, "--rounds", 1, "--ratios", 1, "--codecs", "fp32")
    for way in ("cut", "windows"):
        run("eval", "compression", beir_folder, "-o", way, *short_model, *options, "--long-passages", way)
    reports = [json.loads((Path(way) / "compression.json").read_text()) for way in ("cut", "windows")]
    assert [report["windows_fingerprint"] is None for report in reports] == [True, False]


def test_info_names_what_windows_are_made_by(run: Run, short_model: Any, make_short: Callable[..., KalmReranker]) -> None:
    printed = json.loads(run("info", *short_model, "--json").stdout)
    assert (printed["fingerprint"], printed["windows_fingerprint"]) == make_short().fingerprints


def test_plan_and_doctor_know_the_limit_of_a_checkpoint(run: Run, short_model: Any) -> None:
    """A plan says how many windows there are, or what is cut; doctor, what of a long passage fits."""
    shown = run("plan", *short_model, "--tokens", 200, "--speed", 1).stdout
    planned = make_plan(str(short_model[1]), 1, 200, speed=1.0).reading
    assert (planned.max_passage_tokens, planned.windows) == (LIMIT, 4)
    assert f"long passages       about 4 windows each, of 64 tokens at most: {planned.tokens_read} tokens" in shown
    cut = run("plan", *short_model, "--tokens", 200, "--speed", 1, "--long-passages", "cut").stdout
    assert "long passages       cut to 64 tokens: the last 136 are not read" in cut
    few = json.loads(run("plan", *short_model, "--tokens", 200, "--speed", 1, "--max-windows", 2, "--json").stdout)
    assert few["reading"]["windows"] == 2
    assert "long passages" not in run("plan", *short_model, "--tokens", 60, "--speed", 1).stdout
    findings = json.loads(run("doctor", *short_model, "--codec", "fp16", "--json").stdout)["findings"]
    found = {finding["name"]: finding["found"] for finding in findings}
    most = int(found["OpenSearch, Elasticsearch"].split("up to about ")[1].split(" tokens, in windows")[0].replace(",", ""))
    characters = [make_plan(str(short_model[1]), 1, tokens, codec="fp16", speed=1.0).characters for tokens in (most, most + 1)]
    assert characters[0] <= 32_766 < characters[1]
