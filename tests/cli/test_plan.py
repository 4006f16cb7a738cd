"""`kalm plan`: what a collection takes before it is encoded."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
from tools import planning_page
from tools.command_line import TEXTS, Run, assert_fails, read_jsonl

from kalm_integrations.core.passages.codecs import CODECS
from kalm_integrations.core.settings import CODEC_NAMES, DEFAULT_CODEC
from kalm_integrations.planning.plans import read_measured


def plan_of(run: Run, *arguments: object) -> dict[str, Any]:
    """For the benchmark's machine, which need not be measured."""
    printed: dict[str, Any] = json.loads(run("plan", "--json", "--speed", 1, *arguments).stdout)
    return printed


def test_plan_counts_the_characters_that_encode_writes(run: Run, model: Any) -> None:
    """For the same checkpoint, ratio and codec."""
    encoded = run("encode", *model, "--ratio", 2, "--codec", "int8", stdin=json.dumps({"text": " ".join(TEXTS)}))
    [row] = read_jsonl(encoded.stdout)
    facts = json.loads(run("inspect", row["kalm_encoding"], "--json").stdout)
    options = ("--passages", 3, "--tokens", facts["tokens"], "--ratio", 2, "--codec", "int8")
    planned = plan_of(run, *model, *options)
    assert planned["characters"] == facts["characters"]
    assert planned["total"] == 3 * facts["characters"]
    for ratio, by_codec in facts["lengths"].items():
        if ratio in planned["lengths"]:
            assert planned["lengths"][ratio] == {codec: by_codec[codec] for codec in CODEC_NAMES}


def test_plan_prints_plain_numbers_and_the_same_as_tables(run: Run) -> None:
    """The defaults are a million passages of 256 tokens under Nano."""
    planned = plan_of(run)
    assert (planned["passages"], planned["tokens"], planned["model"]) == (1_000_000, 256, "nano")
    assert (planned["ratio"], planned["codec"]) == (4, DEFAULT_CODEC)
    assert planned["states"] == 64
    assert set(planned["stores"]) == set(read_measured()["stores"])
    payload = CODECS[DEFAULT_CODEC].n_bytes(64, 640)
    assert planned["characters"] == pytest.approx(payload * 4 / 3, abs=250)
    seconds = planned["seconds"]
    assert seconds["scale"] == 1
    numbers = [*planned["stores"].values(), *seconds["query"].values(), seconds["encoding"], *planned["memory"].values()]
    assert all(number > 0 for number in numbers if not isinstance(number, str))
    assert all(math.isfinite(number) for number in seconds["query"].values())
    shown = run("plan", "--speed", 1).stdout
    for ratio in planned["lengths"].values():
        assert all(f"{length:,}" in shown for length in ratio.values())
    for name in (*planned["stores"], *planned["room"]):
        assert name in shown
    assert f"{planned['characters']:,} characters a passage" in shown
    assert f"{planned['memory']['prefixes']:,} in the default cache" in shown


def test_plan_counts_the_characters_of_long_passages_in_thousands(run: Run) -> None:
    """No number is cut where the terminal has 80 columns."""
    planned = plan_of(run, "--tokens", 4000, "--long-passages", "windows")
    shown = run("plan", "--speed", 1, "--tokens", 4000, "--long-passages", "windows").stdout
    assert "1,000 characters at ratio" in shown
    assert "…" not in shown
    assert all(f"{length / 1000:,.0f}" in shown for by_codec in planned["lengths"].values() for length in by_codec.values())
    assert "1,000 characters" not in run("plan", "--speed", 1).stdout


def test_plan_follows_its_options(run: Run) -> None:
    small, large = (
        plan_of(run, "--model", "small", "--prefix-dtype", dtype, "--dtype", "bfloat16") for dtype in ("float16", "float32")
    )
    assert large["memory"]["prefix"] == 2 * small["memory"]["prefix"]
    assert (small["memory"]["prefix_dtype"], small["seconds"]["dtype"]) == ("float16", "bfloat16")
    assert plan_of(run, "--dtype", "bf16")["memory"]["prefix_dtype"] == "bfloat16"
    odd = plan_of(run, "--ratio", 3, "--tokens", 100)
    assert (odd["states"], list(odd["lengths"])) == (34, ["1", "2", "3", "4", "8", "16", "32"])


def test_plan_says_what_changing_the_checkpoint_takes(run: Run) -> None:
    options = ("--passages", 1000, "--tokens", 100, "--codec", "int8")
    new, old = (plan_of(run, "--model", name, *options) for name in ("small", "nano"))
    changed = plan_of(run, "--model", "small", "--migrate", "nano", *options)
    migration = changed.pop("migration")
    assert changed == new, "the plan itself does not depend on what was there before"
    assert (migration["before"], migration["after"]) == (old["stores"], new["stores"])
    assert migration["both"] == {name: old["stores"][name] + new["stores"][name] for name in new["stores"]}
    assert migration["seconds"] == new["seconds"]["encoding"]
    assert migration["documents_per_second"] * migration["seconds"] == pytest.approx(1000)
    shown = run("plan", "--speed", 1, "--model", "small", "--migrate", "nano", *options).stdout
    assert "bytes, nano to small" in shown
    assert "documents a second" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--migrate", "nobody/knows"), "nobody/knows"),
        (("--codec", "zip"), "storage_codec must be one of"),
        (("--passages", 0), "passages must be a whole number from 1"),
        (("--model", "nobody/knows"), "nobody/knows"),
        (("--ratio", -1), "compression_ratio"),
        (("--speed", 0), "speed must be positive"),
    ],
)
def test_plan_refuses_in_one_line(run: Run, arguments: Any, message: str) -> None:
    assert_fails(run("plan", *arguments), message)


def test_the_page_shows_what_plan_prints() -> None:
    assert planning_page.PAGE.read_text(encoding="utf-8") == planning_page.updated_page(), (
        "run, in tests/: python -m tools.planning_page"
    )


def test_help_of_plan_loads_nothing_heavy() -> None:
    code = (
        "import sys; from kalm_integrations.cli import app\n"
        "try: app(['plan', '--help'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        "loaded = {'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
