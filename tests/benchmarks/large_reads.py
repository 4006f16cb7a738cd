"""`python -m benchmarks.large_reads`: how long the encodings of a query take to be read from stores that hold 100,000.

`measure` writes docs/benchmarks/large_reads.json, store by store, so that each can be measured by a command of its own;
`render` writes the tables of docs/scale.md from it.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import large_page, machine, trials
from benchmarks.large_encodings import Encodings, key_of
from benchmarks.large_readers import measure_processes
from benchmarks.large_stores import LargeChroma, LargePostgres, LargeQdrant, LargeRedis, evict, warm
from benchmarks.rows import progress
from benchmarks.store_kinds import Kind, Row
from kalm_integrations import KalmReranker, Passage
from kalm_integrations.core.passages.redis_store import RedisPayloadStore
from kalm_integrations.core.passages.stores import LmdbPayloadStore

COUNT = 100_000
CHROMA_INLINE_COUNT = 50_000
"""Chroma writes each string twice: 100,000 would take more than twice the disk of any other store."""
TOP_K = (20, 100)
N_QUERIES = 30
"""Of each row; no passage is asked for twice."""
BATCH = 500
N_PREPARED = 20_000
"""Passages that processes that read at once draw from."""
N_PROCESSES = (1, 2, 4, 8)
INLINE, REFERENCE, BY_TEXT = "inline", "reference", "by text"
WARM, COLD = "warm", "cold"
KINDS: dict[str, type[Kind]] = {"pgvector": LargePostgres, "chroma": LargeChroma, "qdrant": LargeQdrant, "redis": LargeRedis}
LMDB = "lmdb"


@dataclass(frozen=True)
class Way:
    """One way in which a query comes by its encodings."""

    name: str
    get: Callable[[list[int]], list[Passage]]
    """Gives passages by their numbers, as the store has them."""
    open: Callable[[], KalmReranker]
    """Gives a reranker with empty caches, and its payload store opened anew."""
    drop: Callable[[], None] | None
    """Takes what it reads out of the page cache; None where that lies in memory."""
    status: str = "stored"
    """Of every passage that is read."""
    restart: Callable[[], None] = lambda: None


def batches(count: int) -> Iterator[range]:
    """Yield the numbers of passages, as many at a time as an ingest would add."""
    return (range(start, min(start + BATCH, count)) for start in range(0, count, BATCH))


def fill_documents(kind: Kind, encodings: Encodings, count: int, way: str) -> dict[str, Any]:
    """Fill a store with documents that carry strings, or references; return what it took."""
    started = time.perf_counter()
    for numbers in batches(count):
        made = [encodings.make(index) for index in numbers]
        kind.add([Row(each.key, each.text, each.inline if way == INLINE else each.reference) for each in made])
    seconds = time.perf_counter() - started
    kind.close()
    sizes = kind.weigh()
    started = time.perf_counter()
    kind.open()
    return {"way": way, "documents": count, "seconds": seconds, "open_seconds": time.perf_counter() - started, **sizes}


def fill_payloads(store: Any, encodings: Encodings, count: int) -> None:
    """Fill a payload store, by which references and lookups by text are answered."""
    for numbers in batches(count):
        made = [encodings.make(index) for index in numbers]
        store.update({each.payload_name: each.payload for each in made})


def measure_way(way: Way, count: int, n_queries: int, top_k: Sequence[int]) -> list[dict[str, Any]]:
    """Time queries whose passages no query asked for before: with the files in the page cache, and without."""
    order = random.Random(0).sample(range(count), count)
    rows = []
    for state in (WARM, COLD) if way.drop else (WARM,):
        for k in top_k:
            if state == COLD:
                way.restart()
            reranker = way.open()
            _ask(way, reranker, [order.pop()])
            seconds = []
            for _ in range(n_queries):
                if state == COLD:
                    # A folder that is open stays mapped, and what is mapped stays in memory.
                    del reranker
                    gc.collect()
                    way.drop()
                    reranker = way.open()
                    # Connections and what is imported late; not the passages.
                    reranker.read([Passage("never stored")])
                seconds.append(_ask(way, reranker, [order.pop() for _ in range(k)]))
            fetch, read, cpu = ([round(value, 6) for value in values] for values in zip(*seconds, strict=True))
            facts = {"way": way.name, "state": state, "k": k, "count": count}
            rows.append({**facts, "fetch": fetch, "read": read, "cpu": cpu})
            progress(f"{way.name}, {state}, k={k}: {large_page.summary(rows[-1])}")
    return rows


def _ask(way: Way, reranker: KalmReranker, numbers: list[int]) -> tuple[float, float, float]:
    """Return seconds: for the documents from their store, for the states that their encodings are decoded to, and of CPU.

    The last are those of this process for both, which other work on the machine disturbs least.
    """
    began, started = time.process_time(), time.perf_counter()
    passages = way.get(numbers)
    fetched = time.perf_counter()
    reading = reranker.read(passages)
    ended, stopped = time.perf_counter(), time.process_time()
    assert set(reading.statuses) == {way.status}, reading.counts
    return fetched - started, ended - fetched, stopped - began


def without_encodings(passages: Sequence[Passage]) -> list[Passage]:
    """Return passages of a store that knows nothing of encodings."""
    return [Passage(passage.text) for passage in passages]


def measure_documents(
    name: str, encodings: Encodings, count: int, n_queries: int, top_k: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Measure a store of documents: with strings; with references; and with neither, the text being looked up.

    Yields:
        What is measured after each of both fillings: what has taken minutes is not lost with what comes after it.
    """
    rows, fills = [], []
    for metadata in (INLINE, REFERENCE):
        n = min(count, CHROMA_INLINE_COUNT) if (name, metadata) == ("chroma", INLINE) else count
        with tempfile.TemporaryDirectory(prefix="kalm-large-", ignore_cleanup_errors=True) as root:
            documents, payloads = Path(root, "documents"), Path(root, "payloads")
            documents.mkdir()
            kind: Any = KINDS[name](documents)
            try:
                fills.append(fill_documents(kind, encodings, n, metadata))
                progress(f"{kind.name}: {fills[-1]}")
                if metadata == REFERENCE:
                    store = RedisPayloadStore(kind.url) if name == "redis" else LmdbPayloadStore(payloads)
                    fill_payloads(store, encodings, n)
                    del store
                rows += _document_rows(kind, encodings, metadata, payloads, (n, n_queries, top_k))
            finally:
                kind.end()
                del kind
                gc.collect()
        yield {"store": KINDS[name].name, "payloads": "Redis" if name == "redis" else "LMDB", "fills": fills, "rows": rows}


def _document_rows(
    kind: Any, encodings: Encodings, metadata: str, payloads: Path, sizes: tuple[int, int, Sequence[int]]
) -> list[dict[str, Any]]:
    def get(numbers: list[int]) -> list[Passage]:
        return kind.get([key_of(number) for number in numbers])

    folders = [getattr(kind, "data", kind.folder)] if kind.is_on_disk else []
    if metadata == INLINE:
        ways = [Way(INLINE, get, encodings.open, None)]
    else:
        where = kind.url if isinstance(kind, LargeRedis) else payloads
        if where is payloads:
            folders.append(payloads)

        def open_reranker() -> KalmReranker:
            return encodings.open(where)

        ways = [
            Way(REFERENCE, get, open_reranker, None),
            Way(BY_TEXT, lambda numbers: without_encodings(get(numbers)), open_reranker, None, "found"),
        ]
    for folder in folders:
        warm(folder)

    def drop() -> None:
        for folder in folders:
            evict(folder)

    n, n_queries, top_k = sizes
    rows: list[dict[str, Any]] = []
    for way in ways:
        whole = Way(way.name, way.get, way.open, drop if folders else None, way.status, kind.restart)
        rows += measure_way(whole, n, n_queries, top_k)
        for folder in folders:
            warm(folder)
    return rows


def measure_lmdb(
    encodings: Encodings,
    count: int,
    n_queries: int,
    top_k: Sequence[int],
    seconds: float,
    n_processes: Sequence[int] = N_PROCESSES,
) -> dict[str, Any]:
    """Measure an LMDB folder alone: the passages are at hand; and then by several processes at once."""
    with tempfile.TemporaryDirectory(prefix="kalm-large-") as root:
        payloads = Path(root)
        started = time.perf_counter()
        fill_payloads(LmdbPayloadStore(payloads), encodings, count)
        fill = {"way": "payloads", "documents": count, "seconds": time.perf_counter() - started}
        gc.collect()
        fill["disk"] = sum(path.stat().st_blocks * 512 for path in payloads.iterdir())
        rows = []
        for name, status in ((REFERENCE, "stored"), (BY_TEXT, "found")):
            warm(payloads)
            way = Way(
                name,
                lambda numbers, name=name: encodings.passages(numbers, with_reference=name == REFERENCE),
                lambda: encodings.open(payloads),
                lambda: evict(payloads),
                status,
            )
            rows += [{**row, "fetch": [0.0] * n_queries} for row in measure_way(way, count, n_queries, top_k)]
        warm(payloads)
        prepared = encodings.passages(random.Random(1).sample(range(count), min(count, N_PREPARED)), with_reference=True)
        processes = measure_processes(encodings.checkpoint, payloads, prepared, seconds, n_processes)
    return {"store": "LMDB", "payloads": "LMDB", "fills": [fill], "rows": rows, "processes": processes}


def measure(
    names: Sequence[str], count: int, n_queries: int, top_k: Sequence[int], seconds: float
) -> Iterator[dict[str, Any]]:
    """Yield the results of each store by its name."""
    # Threads of one query only wait for each other where other work has the cores.
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="kalm-large-checkpoint-"))
    try:
        encodings = Encodings(folder)
        for name in names:
            if name == LMDB:
                yield {name: measure_lmdb(encodings, count, n_queries, top_k, seconds)}
            else:
                for measured in measure_documents(name, encodings, count, n_queries, top_k):
                    yield {name: measured}
    finally:
        shutil.rmtree(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure or render."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large_reads", description=__doc__)
    parser.add_argument("command", choices=("measure", "render"))
    parser.add_argument(
        "--stores", nargs="+", choices=(LMDB, *KINDS), default=(LMDB, *KINDS), help="others keep their results"
    )
    parser.add_argument("--count", type=int, default=COUNT, help="encodings in each store")
    parser.add_argument("--queries", type=int, default=N_QUERIES, help="of each row")
    parser.add_argument("--seconds", type=float, default=10, help="for which processes read at once")
    parser.add_argument("--results", type=Path, default=large_page.READS, help="default: docs/benchmarks/large_reads.json")
    options = trials.parse(parser, arguments)
    if options.command == "render":
        large_page.render()
        return
    measured = json.loads(options.results.read_text()) if options.results.exists() else {"stores": {}}
    measured["machine"] = machine.describe("cpu")
    for part in measure(options.stores, options.count, options.queries, TOP_K, options.seconds):
        measured["stores"].update(part)
        trials.write(options.results, measured)


if __name__ == "__main__":
    main()
