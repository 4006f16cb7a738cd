"""What is said apart from the results: errors, notes, and characters that a terminal lacks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tools.command_line import QUERY, TEXTS, Run, assert_fails, run_process


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["rerank"], "Missing argument 'QUERY' (see 'kalm rerank --help')"),
        (["rerank", " "], "the query must hold a word at least"),
        (["rerank", "q", "missing.txt"], "missing.txt: No such file or directory"),
        (["rerank", "q", "."], ".: Is a directory"),
        (["rerank", "q", "--top-k", "0"], "Invalid value for '--top-k'"),
        (["rerank", "q", "--score-threshold", "2"], "Invalid value for '--score-threshold'"),
        (["rerank", "q", "--model", "nope"], "model must be one of pico, nano"),
        (["rerank", "q", "--model", "/no/where"], "a local checkpoint must be an existing folder"),
        (["rerank", "q", "--model", "."], "a checkpoint folder must hold config.json"),
        (["rerank", "q", "--dtype", "float16"], "T5Gemma2 overflows in float16"),
        (["rerank", "q", "--ratio", "0"], "compression_ratio"),
        (["rerank", "q", "--payload-store", "none"], "must be an existing folder, but got 'none'"),
        (["encode", "--codec", "int3"], "storage_codec must be one of"),
        (
            ["encode", "-o", "no/where.jsonl"],
            "the output must be in an existing folder, but got 'no/where.jsonl': there is no folder 'no'",
        ),
        (["encode", "-o", "."], "the output must be a file, or a folder named .parquet, but got '.': it is a folder"),
        (["encode", "-o", "out.csv"], "the output is JSON lines or Parquet and must not be named .csv"),
        (["inspect"], "but standard input holds none"),
        (["inspect", "missing"], "missing: No such file or directory"),
        (["inspect", "kalm1.abc.def"], "a passage encoding must"),
        (["inspect", "{}"], "a row must have an encoding under 'kalm_encoding'"),
        (["eval", "beir", "."], "a BEIR folder must hold corpus.jsonl"),
        (["eval", "beir", ".", "--ratios", "1,x"], "must be positive whole numbers such as 1,2,4, but got 'x'"),
        (["eval", "beir", ".", "--ratios", ","], "Invalid value for --ratios"),
        (["eval", "mteb", "-o", "x", "--benchmark", "BIER"], "--benchmark and --task must be names that mteb knows"),
        (["eval", "mteb", "-o", "x"], "there must be tasks to run"),
        (["train", "missing.toml"], "missing.toml: No such file or directory"),
        (["train", "bad.toml"], "a training configuration must be TOML, but bad.toml is not"),
        (["demo", "--model", "./nothing"], "nothing"),
        (["train", "wrong.toml"], "wrong.toml is not a valid training configuration"),
        (["info", "--nope"], "No such option: --nope"),
    ],
)
def test_errors_are_one_line(run: Run, model: Any, arguments: list[str], message: str) -> None:
    Path("bad.toml").write_text("x = [")
    Path("wrong.toml").write_text("seed = 'x'\n")
    takes_model = arguments[0] in ("rerank", "encode") and "--model" not in arguments
    assert_fails(run(*arguments, *(model if takes_model else ())), message)


def test_warnings_of_the_package_are_notes() -> None:
    """A line each, apart from the results: that pico is not for production, and that a ratio is too coarse."""
    done = run_process("rerank", QUERY, "--ratio", 64, stdin=b"a")
    assert done.stdout.split()[-1] == b"a"
    pico, ratio, summary = done.stderr.decode().splitlines()
    assert pico == "kalm: using the small built-in checkpoint 'pico'; for production pass model='nano' or larger"
    assert ratio.startswith("kalm: compression_ratio=64 is beyond what pico was trained for (1 to 32)")
    assert summary.startswith("kalm: 1 of 1 passages")


def test_a_fetch_is_announced_before_it_fails(tmp_path: Path) -> None:
    nowhere = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = run_process("rerank", QUERY, "--model", "nano", stdin=b"a", **nowhere)
    fetching, error = done.stderr.decode().splitlines()
    assert fetching == "kalm: fetching KaLM-Embedding/KaLM-Reranker-V1-Nano from the hub"
    assert error.startswith("kalm: error: checkpoint 'KaLM-Embedding/KaLM-Reranker-V1-Nano' at revision ")
    assert (done.returncode, done.stdout) == (2, b"")


@pytest.mark.parametrize(
    "encoding",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "cp1252"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
)
def test_a_terminal_that_lacks_characters_shows_question_marks(model: Any, encoding: dict[str, str]) -> None:
    done = run_process("rerank", QUERY, *model, stdin="x 東京\n".encode(), **encoding)
    assert (done.returncode, done.stdout.split()[-1]) == (0, b"??")


def test_json_is_utf8_on_any_terminal_and_facts_are_shown(run: Run, model: Any, tmp_path: Path) -> None:
    """And errors too: standard error spells out what it lacks."""
    (tmp_path / "東").symlink_to(model[1])
    environment = {"PYTHONIOENCODING": "ascii"}
    done = run_process("rerank", QUERY, "--json", *model, stdin=TEXTS[3].encode(), **environment)
    assert [result["row"]["text"] for result in json.loads(done.stdout)["results"]] == [TEXTS[3]]
    assert re.search(rb"\nfolder +\?\n", run_process("info", "--model", "東", **environment).stdout)
    assert run_process("inspect", "京", **environment).stderr == b"kalm: error: \\u4eac: No such file or directory\n"
