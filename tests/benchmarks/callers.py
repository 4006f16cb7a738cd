"""`python -m benchmarks.callers`: many callers of one model, against one after the other, and beside an ingest."""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine, trials
from benchmarks.callers_page import COROUTINES, LOCK, SERIAL, THREADS
from benchmarks.rows import progress
from benchmarks.workload import Workload, make_workload_checkpoint
from kalm_integrations import KalmReranker, Passage
from kalm_integrations.core.passes import choose_batch_size
from kalm_integrations.core.queueing import BULK_PATIENCE

PASSAGE_TOKENS = 128
N_PASSAGES = 300


@dataclass(frozen=True)
class Cell:
    """How many callers ask how often, each time for as many candidates."""

    callers: int
    candidates: int
    requests: int


CELLS = {
    "pico": [
        Cell(64, 3, 300),
        *(Cell(callers, 5, 300) for callers in (1, 8, 64, 200)),
        *(Cell(callers, 20, 200) for callers in (1, 8, 64, 200)),
        *(Cell(callers, 100, max(callers, 24)) for callers in (1, 8, 64, 200)),
    ],
    "nano": [
        Cell(64, 3, 64),
        *(Cell(callers, 5, max(callers, 16)) for callers in (1, 8, 64, 200)),
        Cell(8, 20, 16),
        Cell(64, 20, 64),
        Cell(8, 100, 8),
    ],
    "toy": [Cell(1, 3, 4), Cell(4, 3, 8)],
}
ROUNDS = {"pico": 2, "nano": 2, "toy": 1}
INGESTED = {"pico": 10_000, "nano": 200, "toy": 200}
"""Passages that are being encoded beside a query."""


class Requests:
    """Queries with stored candidates, whose prefix states are in memory: what a service is asked day by day."""

    def __init__(self, reranker: KalmReranker, texts: Sequence[str]) -> None:
        stored = [metadata["kalm_encoding"] for metadata in reranker.encode_to_metadata(texts)]
        self.reranker = reranker
        self.passages = [Passage(text, value) for text, value in zip(texts, stored, strict=True)]
        self.words = sorted({word for text in texts for word in text.split()})
        reranker.prepare(self.passages)

    def make(self, cell: Cell, seed: int) -> list[tuple[str, list[Passage]]]:
        draw = random.Random(seed)
        return [
            (" ".join(draw.choices(self.words, k=draw.randint(4, 12))), draw.sample(self.passages, cell.candidates))
            for _ in range(cell.requests)
        ]


def by_threads(cell: Cell, requests: Sequence[Any], ask: Callable[[Any], object]) -> list[float]:
    """Return the seconds of each request; each thread asks as soon as it has its answer."""
    left, seconds = iter(requests), []

    def work() -> None:
        while True:
            with lock:
                request = next(left, None)
            if request is None:
                return
            started = time.perf_counter()
            ask(request)
            seconds.append(time.perf_counter() - started)

    lock = threading.Lock()
    with ThreadPoolExecutor(cell.callers) as pool:
        for done in [pool.submit(work) for _ in range(cell.callers)]:
            done.result()
    return seconds


async def by_coroutines(reranker: KalmReranker, cell: Cell, requests: Sequence[Any]) -> list[float]:
    left, seconds = iter(requests), []

    async def work() -> None:
        for query, passages in left:
            started = time.perf_counter()
            await reranker.arank(query, passages)
            seconds.append(time.perf_counter() - started)

    await asyncio.gather(*(work() for _ in range(cell.callers)))
    return seconds


def measure_cell(requests: Requests, cell: Cell, rounds: int) -> dict[str, Any]:
    """Return, for each way and round, queries per second and the latencies at 50 and 99 of a hundred, in seconds."""
    reranker, alone = requests.reranker, threading.Lock()

    def rank(request: Any) -> object:
        return reranker.rank(*request)

    def rank_locked(request: Any) -> object:
        with alone:
            return reranker.rank(*request)

    ways: dict[str, Callable[[Sequence[Any]], list[float]]] = {
        SERIAL: lambda asked: by_threads(Cell(1, cell.candidates, cell.requests), asked, rank),
        LOCK: lambda asked: by_threads(cell, asked, rank_locked),
        THREADS: lambda asked: by_threads(cell, asked, rank),
        COROUTINES: lambda asked: asyncio.run(by_coroutines(reranker, cell, asked)),
    }
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for index in range(rounds):
        asked = requests.make(cell, index)
        for name, way in ways.items():
            started = time.perf_counter()
            seconds = sorted(way(asked))
            rate = len(asked) / (time.perf_counter() - started)
            p50, p99 = (seconds[round(share * (len(seconds) - 1))] for share in (0.5, 0.99))
            measured[name].append({"rate": rate, "p50": p50, "p99": p99})
            progress(f"{cell.callers} callers × {cell.candidates}, {name}: {rate:.1f} queries/s")
    return {"callers": cell.callers, "candidates": cell.candidates, "requests": cell.requests, "ways": measured}


def measure_ingest(requests: Requests, texts: Iterator[str], n_ingested: int, n_queries: int) -> dict[str, Any]:
    """Return the seconds of queries over stored candidates, alone and while passages are being encoded."""
    reranker = requests.reranker
    n_candidates = min(20, len(requests.passages))
    asked = requests.make(Cell(1, n_candidates, n_queries), 7)
    queue = [next(texts) for _ in range(n_ingested)]

    async def run() -> dict[str, Any]:
        async def ask() -> list[float]:
            seconds = []
            for query, passages in asked:
                started = time.perf_counter()
                await reranker.arank(query, passages)
                seconds.append(time.perf_counter() - started)
                # Else the ingest would never have its turn.
                await asyncio.sleep(0.02)
            return seconds

        alone = await ask()
        started = time.perf_counter()
        ingest = asyncio.create_task(reranker.aencode_passages(queue))
        while reranker.runtime.engine.n_queued == 0:
            await asyncio.sleep(0.001)
        beside = await ask()
        is_done = ingest.done()
        ingest.cancel()
        await asyncio.gather(ingest, return_exceptions=True)
        return {
            "candidates": n_candidates,
            "alone": alone,
            "beside": beside,
            "is_done": is_done,
            "seconds": time.perf_counter() - started,
            "n_ingested": n_ingested,
        }

    measured = asyncio.run(run())
    # One batch, of as many passages as the encoder takes, the longest first as in an ingest.
    size = choose_batch_size("encode", reranker.runtime)
    batches = []
    for start in range(0, 4 * size, size):
        batch = sorted(queue[-4 * size :], key=len)[::-1][start : start + size]
        fresh = [f"{text} again" for text in batch]
        started = time.perf_counter()
        reranker.encode_passages(fresh)
        batches.append(time.perf_counter() - started)
    return {**measured, "batch": statistics.median(batches), "patience": BULK_PATIENCE}


def measure(shape: str) -> dict[str, Any]:
    """Measure all cells of a shape, and queries beside an ingest."""
    with tempfile.TemporaryDirectory() as folder:
        # pico's tokenizer has its own words; those of the workload are words to it too.
        made = make_workload_checkpoint("toy" if shape == "pico" else shape, Path(folder))
        workload = Workload(made)
        reranker = KalmReranker.from_pretrained("pico" if shape == "pico" else made)
        n_passages = 12 if shape == "toy" else N_PASSAGES
        n_tokens = 32 if shape == "toy" else PASSAGE_TOKENS
        requests = Requests(reranker, workload.passages(n_tokens, n_passages))
        cells = [measure_cell(requests, cell, ROUNDS[shape]) for cell in CELLS[shape]]
        texts = (f"{text} {number}" for number, text in enumerate(workload.passages(n_tokens, INGESTED[shape] + 1)))
        ingest = measure_ingest(requests, texts, INGESTED[shape], 5 if shape == "toy" else 30)
    return {"shape": shape, "passage_tokens": n_tokens, "rounds": ROUNDS[shape], "cells": cells, "ingest": ingest}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = trials.parser("callers", __doc__)
    parser.add_argument("--shapes", choices=CELLS, nargs="+", default=("pico", "nano"))
    options = trials.parse(parser, arguments)
    facts = machine.describe("cpu")
    trials.write(options.output, {"machine": facts, "shapes": [measure(shape) for shape in options.shapes]})


if __name__ == "__main__":
    main()
