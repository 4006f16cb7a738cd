"""Memory and rate of `kalm encode` over many short passages: `python -m benchmarks.bulk --rows 100000 results.json`."""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
from tools.paths import ROOT

from benchmarks import machine
from kalm_integrations.bulk import read_encoded

SAMPLE = ROOT / "kalm_integrations" / "samples" / "xquad-en" / "corpus.jsonl"
N_WORDS = (8, 32)
"""Of a passage, at least and at most."""
SECONDS_BETWEEN = 0.5
STUB = """
import sys
from kalm_integrations.bulk import encode_corpus
from kalm_integrations.testing import FakeReranker
encode_corpus(sys.argv[1], sys.argv[2], FakeReranker())
"""


def main() -> None:
    """Parse the command line, measure, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="file of JSON, to which the run is added")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--output", default="out.parquet", help="name, which says the format")
    parser.add_argument("--without-model", action="store_true", help="with a stub's encodings: all but the model")
    parser.add_argument("--folder", type=Path, help="where the data lie meanwhile; a temporary folder by default")
    options = parser.parse_args()
    facts = machine.describe("cpu")
    with tempfile.TemporaryDirectory(prefix="kalm-bulk-", dir=options.folder) as folder:
        run = measure(Path(folder), options.rows, options.output, is_stub=options.without_model)
    runs = json.loads(options.results.read_text()) if options.results.exists() else {}
    name = f"{options.rows} {Path(options.output).suffix}{' without model' if options.without_model else ''}"
    runs[name] = {"machine": facts, **run}
    options.results.write_text(json.dumps(runs, indent=1) + "\n")


def measure(folder: Path, n_rows: int, output: str, *, is_stub: bool) -> dict[str, Any]:
    """Encode so many passages in a child, and return what that took; memory is that of the child's tenths of the time."""
    source = folder / "corpus.jsonl"
    make_corpus(source, n_rows)
    paths = [str(source), str(folder / output)]
    command = [sys.executable, "-c", STUB, *paths]
    if not is_stub:
        command = [sys.executable, "-m", "kalm_integrations", "encode", paths[0], "-o", paths[1]]
    started = time.perf_counter()
    resident: list[int] = []
    cpu_seconds = 0.0
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        process = psutil.Process(child.pid)
        while child.poll() is None:
            try:
                resident.append(process.memory_info().rss)
                cpu_seconds = sum(process.cpu_times()[:2])
            except psutil.NoSuchProcess:
                break
            time.sleep(SECONDS_BETWEEN)
        assert child.stderr is not None
        said = child.stderr.read()
    seconds = time.perf_counter() - started
    if child.returncode:
        raise RuntimeError(said)
    written = folder / output
    files = [written] if written.is_file() else list(written.iterdir())
    found = sum(1 for _ in read_encoded(written))
    assert found == n_rows, found
    return {
        "rows": n_rows,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "rows_per_second": round(n_rows / seconds, 1),
        "input_bytes": source.stat().st_size,
        "output_bytes": sum(file.stat().st_size for file in files),
        "output_files": len(files),
        "peak_resident_bytes": max(resident),
        "peak_resident_bytes_by_tenth": [max(part) for part in _tenths(resident)],
        "said": [line for line in said.splitlines() if line.startswith("kalm: ")],
    }


def make_corpus(path: Path, n_rows: int) -> None:
    """Write passages of words of real ones, no two alike."""
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    words = sorted({word for row in rows for word in re.findall(r"\w+", row["text"])})
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(n_rows):
            text = " ".join(draw.choices(words, k=draw.randint(*N_WORDS)))
            file.write(json.dumps({"_id": str(number), "text": f"{text} {number}"}, ensure_ascii=False) + "\n")


def _tenths(values: list[int]) -> list[list[int]]:
    size = max(1, -(-len(values) // 10))
    given = iter(values)
    return list(iter(lambda: list(islice(given, size)), []))


if __name__ == "__main__":
    main()
