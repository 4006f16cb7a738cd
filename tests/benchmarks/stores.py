"""`python -m benchmarks.stores`: what encodings take in real stores, and what they cost a search.

`measure` writes docs/benchmarks/stores.json; `render` writes the tables of docs/stores.md from it.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import pybase64

from benchmarks import machine, stores_page, trials
from benchmarks.rows import progress
from benchmarks.store_kinds import BATCH, VECTOR_WIDTH, Kind, Row, all_kinds
from kalm_integrations.samples import XQUAD_EN

HEADER = "kalm1." + "0" * 196 + "."
"""As long as what stands before the payload in most metadata strings."""
PAYLOADS = {"rot3": 16_128, "rot4": 21_248, "fp16": 81_920}
"""Bytes of a passage of 256 tokens at Nano's width and ratio 4, without the few bytes of rot3 and rot4 that fit no rule."""
SPREAD = 0.1
"""Sizes are drawn this far around their mean, so that what rounds to pages rounds evenly."""
COUNTS = (500, 2_000)
"""Passages in a store; Chroma writes a copy of the first 1,000 more than of those after them."""
TOP_K = (20, 50)
ROUNDS = 61
TEXT_CHARACTERS = 1_100
"""256 tokens of English."""


def read_words() -> list[str]:
    lines = (XQUAD_EN / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    return " ".join(json.loads(line)["text"] for line in lines).split()


def make_rows(n_bytes: int, n: int, *, as_payloads: bool) -> list[Row]:
    """Return n passages with random encodings, which cannot be compressed any more than real ones."""
    draw, words = random.Random(f"{n_bytes} {n}"), read_words()
    rows = []
    for index in range(n):
        start = draw.randrange(len(words) - TEXT_CHARACTERS)
        text = " ".join(words[start : start + TEXT_CHARACTERS])[:TEXT_CHARACTERS]
        value: str | bytes | None = None
        if n_bytes:
            payload = draw.randbytes(round(n_bytes * draw.uniform(1 - SPREAD, 1 + SPREAD)))
            value = payload if as_payloads else HEADER + pybase64.urlsafe_b64encode(payload).decode().rstrip("=")
        rows.append(Row(str(UUID(int=index)), f"{index} {text}", value))
    return rows


def fill(make: Callable[[Path], Kind], folder: Path, n_bytes: int, n: int) -> tuple[Kind, dict[str, Any]]:
    """Return a store that was filled, closed and opened again, and what it weighed meanwhile."""
    folder.mkdir()
    kind = make(folder)
    rows = make_rows(n_bytes, n, as_payloads=kind.holds_payloads)
    for start in range(0, n, BATCH):
        kind.add(rows[start : start + BATCH])
    kind.close()
    sizes = kind.weigh()
    kind.open()
    return kind, {"passages": n, "stored": sum(len(row.value) for row in rows if row.value is not None), **sizes}


def time_fetches(kinds: dict[str, Kind], k: int, rounds: int) -> dict[str, float]:
    """Return the least milliseconds in which each gives k passages, which other work disturbs least; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, kind in kinds.items():
            started = time.perf_counter()
            found = kind.fetch(k)
            seconds[name].append(time.perf_counter() - started)
            assert len(found) == k
    return {name: 1000 * min(values) for name, values in seconds.items()}


def measure_kind(
    make: Callable[[Path], Kind], payloads: dict[str, int], counts: Sequence[int], top_k: Sequence[int], rounds: int
) -> dict[str, Any]:
    """Measure one kind of store: weighed at every count, timed at the first."""
    weighed: list[dict[str, Any]] = []
    fetched: list[dict[str, Any]] = []
    for n in counts:
        # What a store holds open may be written to until the process ends.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as root:
            kinds = {}
            for payload, n_bytes in {"none": 0, **payloads}.items():
                kinds[payload], sizes = fill(make, Path(root) / f"{payload}-{n}", n_bytes, n)
                weighed.append({"payload": payload, **sizes})
            name, holds_payloads = kinds["none"].name, kinds["none"].holds_payloads
            if n == counts[0]:
                asked = {payload: kind for payload, kind in kinds.items() if payload != "none" or not holds_payloads}
                fetched = [{"passages": n, "k": k, "milliseconds": time_fetches(asked, k, rounds)} for k in top_k]
            for kind in kinds.values():
                kind.end()
        gc.collect()
        progress(f"{name}, {n} passages: {weighed[-len(payloads) - 1 :]}")
    return {"store": name, "holds_payloads": holds_payloads, "weighed": weighed, "fetched": fetched}


def measure(
    payloads: dict[str, int], counts: Sequence[int], top_k: Sequence[int] = TOP_K, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Measure all kinds of stores."""
    with all_kinds() as makers:
        stores = [measure_kind(make, payloads, counts, top_k, rounds) for make in makers.values()]
    facts = {"text_characters": TEXT_CHARACTERS, "vector_width": VECTOR_WIDTH}
    return {"rounds": rounds, **facts, "payloads": payloads, "stores": stores}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure or render."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stores", description=__doc__)
    parser.add_argument("command", choices=("measure", "render"))
    parser.add_argument("--results", type=Path, default=stores_page.RESULTS, help="default: docs/benchmarks/stores.json")
    options = parser.parse_args(arguments)
    if options.command == "render":
        stores_page.render(options.results)
        return
    facts = machine.describe("cpu")
    trials.write(options.results, {"machine": facts, **measure(PAYLOADS, COUNTS)})


if __name__ == "__main__":
    main()
