"""A service's day, in short or in full: several callers ingest, query, update, delete and backfill in real stores.

`make soak` goes on for KALM_SOAK_SECONDS; without it, as in `make test`, each caller does a fixed number of operations.
"""

from __future__ import annotations

import logging
import os
import random
import statistics
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator

import psutil
import pytest
from tools.soaking import Shelf, open_shelves

from kalm_integrations import KalmReranker, Passage
from kalm_integrations.core.types import ENCODING_KEY
from kalm_integrations.hosting import wait_for_write_back

N_CALLERS = 4
N_OPERATIONS = 45
"""Of each caller, where no time is given."""
MAX_DOCUMENTS = 120
"""In a store; more are not added, so that memory has no reason to grow."""
TOLERANCE = 1e-4
"""Between a score from what was stored or cached and one without; another text's differs by more."""
MAX_GROWTH = 4.0
"""MiB a minute over the second half, by least squares."""
WORDS = ["rhine", "alps", "otter", "crab", "river", "won", "lost", "game", "panthers", "points", "2015", "lyon"]
OPERATIONS = ["add", "add", "query", "query", "query", "query", "update", "update under old encoding", "delete", "damage"]
N_BETWEEN_BACKFILLS = 40


class Soak:
    """What callers do, what they must find, and what went wrong."""

    def __init__(self, shelves: dict[str, Shelf], plain: KalmReranker) -> None:
        self.shelves = shelves
        self.plain = plain
        self.held: dict[str, dict[str, str]] = {name: {} for name in shelves}
        """The texts that each store must hold, by key; changed under the shelf's lock."""
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []

    def work(self, caller: int, is_over: Callable[[int], bool]) -> None:
        """Do one operation after the other; a caller's are the same in every run, their order with others' is not."""
        source = random.Random(caller)
        n = 0
        while not is_over(n):
            n += 1
            name = source.choice(list(self.shelves))
            operation = "backfill" if n % N_BETWEEN_BACKFILLS == 0 else source.choice(OPERATIONS)
            try:
                self._do(operation, name, source, f"{caller}-{n}")
            except Exception:
                self.faults.append(f"{operation} in {name}:\n{traceback.format_exc()}")
            self.counts[operation] += 1

    def _do(self, operation: str, name: str, source: random.Random, new: str) -> None:
        shelf, held = self.shelves[name], self.held[name]
        if operation == "query":
            self._query(name, source)
            return
        with shelf.lock:
            if operation == "add" and len(held) < MAX_DOCUMENTS:
                texts = {f"{new}-{i}": _text(source, f"{new}-{i}") for i in range(5)}
                documents = [shelf.make(key, text) for key, text in texts.items()]
                shelf.put(shelf.encoded(documents) if source.random() < 0.6 else documents)
                held.update(texts)
            elif operation == "backfill":
                shelf.backfill()
            elif held:
                self._change(operation, shelf, held, source, new)

    def _change(self, operation: str, shelf: Shelf, held: dict[str, str], source: random.Random, new: str) -> None:
        """Change one document."""
        key = source.choice(list(held))
        [old] = shelf.get([key])
        if operation == "delete":
            shelf.delete([key])
            del held[key]
        elif operation == "damage":
            value = source.choice(_DAMAGES)(shelf.read(old)[1].get(ENCODING_KEY) or "", source)
            shelf.put([shelf.with_metadata(old, {**shelf.read(old)[1], ENCODING_KEY: value})])
        elif operation != "add":
            text = _text(source, new)
            changed = shelf.make(key, text)
            is_encoded = operation == "update"
            shelf.put(shelf.encoded([changed]) if is_encoded else [shelf.with_metadata(changed, shelf.read(old)[1])])
            held[key] = text

    def _query(self, name: str, source: random.Random) -> None:
        shelf, held = self.shelves[name], self.held[name]
        query = " ".join(source.choices(WORDS, k=3))
        with shelf.lock:
            keys = source.sample(list(held), min(len(held), 8))
            found = shelf.search(query, keys, 8)
            expected = {key: held.get(key) for key in (shelf.read(document)[0] for document in found)}
        ranked = shelf.rerank(query, found)
        if {document.key: document.text for document in ranked} != expected:
            self.faults.append(f"a query of {name} returned other texts than those that the store held")
        if source.random() < 0.3:
            self.counts["scores compared"] += len(ranked)
            scores = self.plain.score(query, [document.text for document in ranked])
            if [document.score for document in ranked] != pytest.approx(scores, abs=TOLERANCE):
                self.faults.append(f"a query of {name} returned other scores than a reranker without caches")

    def check_what_is_left(self, reranker: KalmReranker) -> None:
        """Compare each store with what it must hold, and its encodings with new ones."""
        for name, shelf in self.shelves.items():
            held = self.held[name]
            assert shelf.texts() == held, name
            shelf.backfill()
            documents = shelf.get(list(held))
            rows = [(key, metadata.get(ENCODING_KEY)) for key, metadata in map(shelf.read, documents)]
            assert {key for key, _ in rows} == held.keys(), name
            reading = reranker.read([Passage(held[key], encoding) for key, encoding in rows])
            assert reading.counts["stored"] == len(held), name
            fresh = self.plain.score("who won", [held[key] for key, _ in rows])
            assert reranker.score("who won", reading) == pytest.approx(fresh, abs=TOLERANCE), name


def _text(source: random.Random, name: str) -> str:
    return f"{name} " + " ".join(source.choices(WORDS, k=20))


_DAMAGES: list[Callable[[str, random.Random], str]] = [
    lambda value, source: "",
    lambda value, source: "kalm1.x.y",
    lambda value, source: value[: source.randrange(len(value) + 1)],
    lambda value, source: value[::-1],
    lambda value, source: value.replace("A", "B", 1),
]


class Logged(logging.Handler):
    """Keeps what was logged with an exception: write-back fails no query, but here it must not fail either."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.faults.append(self.format(record))


@pytest.fixture
def logged() -> Iterator[Logged]:
    handler, logger = Logged(), logging.getLogger("kalm_integrations")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def watch(threads: list[threading.Thread]) -> list[tuple[float, float]]:
    """Wait for threads; return minutes and MiB of resident memory, second by second."""
    process, started, samples = psutil.Process(), time.monotonic(), []
    while any(thread.is_alive() for thread in threads):
        samples.append(((time.monotonic() - started) / 60, process.memory_info().rss / 2**20))
        # Not `join` of one of them: it may end before the others, and samples would pile up.
        time.sleep(1 if os.environ.get("KALM_SOAK_SECONDS") else 0.05)
    for thread in threads:
        thread.join()
    return samples


def test_callers_find_what_they_stored(make_reranker, tmp_path, logged):
    seconds = float(os.environ.get("KALM_SOAK_SECONDS", 0))
    # Small caches, so that entries come and go; fp32, so that what was stored scores as what was not.
    reranker = make_reranker(cache_bytes=2**18, prefix_cache_bytes=2**22, storage_codec="fp32")
    soak = Soak(open_shelves(reranker, tmp_path), make_reranker(cache_bytes=0, prefix_cache_bytes=0))
    end = time.monotonic() + seconds

    def is_over(n: int) -> bool:
        return bool(soak.faults) or (time.monotonic() > end if seconds else n >= N_OPERATIONS)

    threads = [threading.Thread(target=soak.work, args=(caller, is_over)) for caller in range(N_CALLERS)]
    for thread in threads:
        thread.start()
    samples = watch(threads)
    assert wait_for_write_back(60)
    assert soak.faults == []
    soak.check_what_is_left(reranker)
    assert logged.faults == []
    assert all(soak.counts[operation] for operation in ("add", "query", "update", "delete", "backfill", "scores compared"))
    if seconds:
        half = samples[len(samples) // 2 :]
        growth = statistics.linear_regression(*zip(*half, strict=True)).slope
        print(f"\n{dict(soak.counts)}\n{reranker.stats}\n{half[-1][1]:.0f} MiB at the end, {growth:+.2f} MiB a minute")
        assert growth < MAX_GROWTH
