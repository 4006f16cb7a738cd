"""For tests of bulk encoding: a reranker that shows what was encoded together, and runs in children that can be killed."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from kalm_integrations.bulk import encode_corpus, encoding
from kalm_integrations.core.types import ENCODING_KEY, Metadata, Passage, Status
from kalm_integrations.testing import FakeReranker

ROWS_PER_WINDOW = 16


class BatchReranker(FakeReranker):
    """Its encodings depend on what was encoded in the same call, as the last bits of real states may."""

    def encode_to_metadata(self, texts: Iterable[str], show_progress: bool = False) -> list[Metadata]:
        given = list(texts)
        batch = hashlib.blake2b("\0".join(given).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        made = super().encode_to_metadata(given)
        return [{**each, ENCODING_KEY: f"{each[ENCODING_KEY]}.{batch}"} for each in made]

    def _status(self, passage: Passage) -> Status:
        encoding = passage.encoding
        whole = encoding.rpartition(".")[0] if isinstance(encoding, str) and encoding.count(".") == 3 else encoding
        return super()._status(replace(passage, encoding=whole))


def write_rows(path: Path, n_rows: int, n_texts: int) -> list[dict[str, Any]]:
    """Write rows of which many share a text, and some carry an encoding: sound, stale or none."""
    fake = BatchReranker()
    carried = fake.encode_to_metadata([f"text {number}" for number in range(n_texts)])
    rows: list[dict[str, Any]] = []
    for number in range(n_rows):
        text = number * 7 % n_texts
        row: dict[str, Any] = {"_id": number, "text": f"text {text}"}
        if number % 11 == 0:
            row |= carried[text if number % 2 else (text + 1) % n_texts]
        elif number % 13 == 0:
            row[ENCODING_KEY] = "none"
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def in_child(work: Callable[[], object], *, max_file_bytes: int | None = None) -> int:
    """Start a process that works and ends with 0, or with 3 and the error in error.txt; return its number."""
    child = os.fork()
    if child:
        return child
    code = 3
    try:
        if max_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, resource.RLIM_INFINITY))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        encoding.ROWS_PER_WINDOW = ROWS_PER_WINDOW
        work()
        code = 0
    except BaseException as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        Path("error.txt").write_text("".join(traceback.format_exception_only(error)), encoding="utf-8")
    finally:
        os._exit(code)


def run_to_the_end(work: Callable[[], object], **limits: int) -> float:
    """Let a child end, which must go well, and return the seconds that took."""
    started = time.perf_counter()
    _, status = os.waitpid(in_child(work, **limits), 0)
    assert status == 0, Path("error.txt").read_text(encoding="utf-8")
    return time.perf_counter() - started


def content(path: Path) -> dict[str, bytes]:
    """Return the bytes of a file, or of a folder's files, by name."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {file.name: file.read_bytes() for file in files}


def encode_with_stub(source: Path, output: Path) -> None:
    encode_corpus(source, output, BatchReranker())
