"""Processes that read one LMDB folder at once; each is `python -m benchmarks.large_readers`, which imports no store."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.paths import TESTS

from kalm_integrations import KalmReranker, Passage

N_PROCESSES = (1, 2, 4, 8)
K = 100
"""Passages of a query."""


def measure_processes(checkpoint: Path, payloads: Path, passages: Sequence[Passage], seconds: float) -> list[dict[str, Any]]:
    """Let 1, 2, 4 and 8 processes read queries, for as many seconds each.

    Args:
        checkpoint: whose encodings they are.
        payloads: the folder that all read.
        passages: with references; each query of each process draws from them.
        seconds: how long.

    Returns:
        For each number of processes the seconds that each query of each process took, and for how long they read.
    """
    file = checkpoint / "passages.json"
    file.write_text(json.dumps([(passage.text, passage.encoding) for passage in passages]))
    command = [sys.executable, "-m", "benchmarks.large_readers", str(checkpoint), str(payloads), str(file), str(seconds)]
    # A thread each: they share the cores already.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    measured = []
    for n in N_PROCESSES:
        readers = [
            subprocess.Popen(
                [*command, str(seed)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=TESTS,
                env=environment,
            )
            for seed in range(n)
        ]
        for reader in readers:
            # Its first line says that it is ready.
            reader.stdout.readline()
        for reader in readers:
            reader.stdin.write("go\n")
            reader.stdin.flush()
        latencies = [json.loads(reader.communicate()[0]) for reader in readers]
        measured.append({"processes": n, "k": K, "seconds": seconds, "latencies": latencies})
    return measured


def read_for(checkpoint: str, payloads: str, passages: str, seconds: float, seed: int) -> None:
    """Read queries and print the seconds of each, from when a line comes in."""
    draw = random.Random(seed)
    prepared = [Passage(text, encoding) for text, encoding in json.loads(Path(passages).read_text())]
    # Without a cache: a passage that is drawn again is read again.
    reranker = KalmReranker.from_pretrained(checkpoint, device="cpu", payload_store=payloads, cache_bytes=0)
    reranker.read(prepared[:1])
    print("ready", flush=True)
    sys.stdin.readline()
    latencies = []
    end = time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        reading = reranker.read(draw.sample(prepared, min(K, len(prepared))))
        latencies.append(time.perf_counter() - started)
        assert set(reading.statuses) == {"stored"}
    print(json.dumps(latencies))


if __name__ == "__main__":
    read_for(*sys.argv[1:4], float(sys.argv[4]), int(sys.argv[5]))
