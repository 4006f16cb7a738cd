"""`python -m benchmarks.large_backfill`: a store of 100,000 documents is filled up with encodings while queries go on.

`measure` writes docs/benchmarks/large_backfill.json, store by store; `render` writes the table of docs/scale.md from it.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_core.documents import Document
from langchain_core.vectorstores import VectorStore
from tools.paths import TESTS

from benchmarks import large_page, machine, trials
from benchmarks.large_encodings import key_of, read_words
from benchmarks.large_filler import MODEL, run
from benchmarks.large_stores import LargePostgres, LargeQdrant
from benchmarks.rows import progress
from benchmarks.store_kinds import Row
from kalm_integrations.langchain import KalmPassageEncoder, KalmRerank

DOCUMENTS = 100_000
CHARACTERS = 100
"""Of a document: about 22 tokens of Pico, so that the store is a good part of what is measured."""
BATCH = 500
K = 20
"""Candidates of a query."""
PAUSE = 0.2
"""Seconds between queries."""
RATE = 100.0
"""Documents per second, where the backfill is held back."""
BEFORE, HELD_BACK, UNBOUND, AFTER = "before", "held back", "as fast as it can", "after"


@dataclass(frozen=True)
class Running:
    """A run that was started."""

    is_over: Callable[[], bool]
    result: Callable[[], dict[str, Any]]
    """What `run` returned, when it is over."""


class Elsewhere:
    """A PostgreSQL, into which another process writes."""

    def __init__(self, folder: Path) -> None:
        self.kind = LargePostgres(folder)

    def start(self, rate: float | None, seconds: float) -> Running:
        """Start a run."""
        command = [sys.executable, "-m", "benchmarks.large_filler", self.kind.uri, str(rate or 0), str(seconds)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=TESTS)
        # Its first line says that its imports are done.
        child.stdout.readline()
        child.stdin.write("go\n")
        child.stdin.flush()
        return Running(lambda: child.poll() is not None, lambda: json.loads(child.communicate()[0]))

    def weigh(self) -> int:
        return self.kind.weigh()["disk"]


class Here:
    """Qdrant's local mode, which has no other process: a thread writes."""

    def __init__(self, folder: Path) -> None:
        self.kind = LargeQdrant(folder)

    def start(self, rate: float | None, seconds: float) -> Running:
        """Start a run."""
        results: list[dict[str, Any]] = []
        thread = threading.Thread(target=lambda: results.append(run(self.kind.store, rate, seconds)))
        thread.start()
        return Running(lambda: not thread.is_alive(), lambda: results[0])

    def weigh(self) -> int:
        return self.kind.weigh()["disk"]


HOLDERS: dict[str, type[Elsewhere | Here]] = {"pgvector": Elsewhere, "qdrant": Here}


def query_until(store: VectorStore, words: list[str], is_over: Callable[[], bool]) -> list[float]:
    """Search and rerank until something is over; return the seconds of each query."""
    rerank = KalmRerank(model=MODEL, top_n=10)
    draw = random.Random(0)
    latencies = []
    while not is_over():
        query = " ".join(draw.sample(words, 8))
        started = time.perf_counter()
        kept = rerank.compress_documents(store.similarity_search(query, k=K), query)
        latencies.append(round(time.perf_counter() - started, 5))
        assert len(kept) == 10
        time.sleep(PAUSE)
    return latencies


def query_for(store: VectorStore, words: list[str], seconds: float) -> list[float]:
    """Search and rerank for some seconds."""
    end = time.monotonic() + seconds
    return query_until(store, words, lambda: time.monotonic() > end)


def measure_store(name: str, n: int, seconds: float, limit: float) -> dict[str, Any]:
    """Measure a store: queries before, while a backfill is held back, while it is not, and afterwards.

    Args:
        name: of the store.
        n: its documents.
        seconds: of each part but the backfill that is not held back.
        limit: for that one; what it does not get to is left.
    """
    words = read_words()
    characters = " ".join(words)
    with tempfile.TemporaryDirectory(prefix="kalm-large-", ignore_cleanup_errors=True) as root:
        holder = HOLDERS[name](Path(root))
        try:
            for first in range(0, n, BATCH):
                numbers = range(first, min(first + BATCH, n))
                holder.kind.add([Row(key_of(i), f"{i} {_cut(characters, i)}", None) for i in numbers])
            holder.kind.wait_for_disk()
            progress(f"{name}: {n} documents are stored")
            store = holder.kind.store
            # Imports and the models of this process.
            query_for(store, words, 0.1)
            before = holder.weigh()
            parts = [{"part": BEFORE, "latencies": query_for(store, words, seconds)}]
            for part, rate, longest in ((HELD_BACK, RATE, seconds), (UNBOUND, None, limit)):
                running = holder.start(rate, longest)
                latencies = query_until(store, words, running.is_over)
                parts.append({"part": part, "latencies": latencies, **running.result()})
                progress(f"{name}, {part}: {parts[-1]['documents']} documents in {parts[-1]['seconds']:.0f} s")
            grown = holder.weigh() - before
            parts.append({"part": AFTER, "latencies": query_for(store, words, seconds)})
        finally:
            holder.kind.end()
    made = KalmPassageEncoder(model=MODEL).transform_documents([Document(f"0 {_cut(characters, 0)}")])
    sizes = {"before": before, "grown": grown, "characters": len(made[0].metadata["kalm_encoding"])}
    return {"store": holder.kind.name, "documents": n, "rate": RATE, "k": K, **sizes, "parts": parts}


def _cut(characters: str, index: int) -> str:
    start = index * 7919 % (len(characters) - CHARACTERS)
    return characters[start : start + CHARACTERS]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure or render."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large_backfill", description=__doc__)
    parser.add_argument("command", choices=("measure", "render"))
    parser.add_argument("--stores", nargs="+", choices=HOLDERS, default=tuple(HOLDERS), help="others keep their results")
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="in each store")
    parser.add_argument("--seconds", type=float, default=30, help="of each part but the backfill that is not held back")
    parser.add_argument("--limit", type=float, default=360, help="seconds for that one; what it does not get to is left")
    parser.add_argument(
        "--results", type=Path, default=large_page.BACKFILL, help="default: docs/benchmarks/large_backfill.json"
    )
    options = trials.parse(parser, arguments)
    if options.command == "render":
        large_page.render()
        return
    measured = json.loads(options.results.read_text()) if options.results.exists() else {"stores": {}}
    measured["machine"] = machine.describe("cpu")
    for name in options.stores:
        measured["stores"][name] = measure_store(name, options.documents, options.seconds, options.limit)
        trials.write(options.results, measured)


if __name__ == "__main__":
    main()
