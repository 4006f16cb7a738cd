"""A backfill that is measured: bounded in time, its memory watched. As a program, the process that fills a PostgreSQL."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.vectorstores import VectorStore
from langchain_postgres import PGVector

from kalm_integrations.hosting.stores import Changes, DocumentAccess, DocumentId, Label
from kalm_integrations.langchain import KalmPassageEncoder, backfill
from kalm_integrations.langchain.stores import access_to

MODEL = "pico"


class Bounded:
    """A store's access that finds no more documents after a time, and counts what is written."""

    def __init__(self, access: DocumentAccess[Document], seconds: float) -> None:
        self._access = access
        self._end = time.monotonic() + seconds
        self.n_written = 0

    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        return takewhile(lambda _: self._is_open, self._access.find_ids(without))

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Document]:
        # Ids come by the thousand: those that are left are passed over.
        return self._access.read(ids) if self._is_open else {}

    def id_of(self, document: Document) -> DocumentId | None:
        return self._access.id_of(document)

    def add_metadata(self, changes: Changes) -> None:
        self._access.add_metadata(changes)
        self.n_written += len(changes)

    @property
    def _is_open(self) -> bool:
        return time.monotonic() < self._end


def run(store: VectorStore, rate: float | None, seconds: float) -> dict[str, Any]:
    """Backfill for as long at most; return what was done, and this process's memory meanwhile, second by second."""
    encoder = KalmPassageEncoder(model=MODEL)
    encoder.reranker.warm_up(decoder=False)
    access = Bounded(access_to(store), seconds)
    memory: list[int] = []
    has_ended = threading.Event()

    def watch() -> None:
        while not has_ended.wait(1):
            memory.append(read_memory("VmRSS"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started, began = time.perf_counter(), time.process_time()
    try:
        report = backfill(access, encoder, check_texts=False, documents_per_second=rate, show_progress=False)
    finally:
        has_ended.set()
        watcher.join()
    assert report.n_failed == report.n_changed == 0, report
    taken = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - began}
    return {"documents": access.n_written, **taken, "memory": memory, "peak": read_memory("VmHWM")}


def read_memory(field: str) -> int:
    """Return a field of this process's memory in bytes."""
    with Path("/proc/self/status").open(encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{field}:"))


def main(uri: str, rate: float, seconds: float) -> None:
    """Fill a store from when a line comes in, and print what was done."""
    uri = uri.replace("postgresql://", "postgresql+psycopg://")
    # No vector is asked for.
    store = PGVector(DeterministicFakeEmbedding(size=1), connection=uri, collection_name="kalm")
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(run(store, rate or None, seconds)))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]))
