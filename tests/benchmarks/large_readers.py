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

K = 100
"""Passages of a query."""


def measure_processes(
    checkpoint: Path, payloads: Path, passages: Sequence[Passage], seconds: float, n_processes: Sequence[int]
) -> list[dict[str, Any]]:
    """Let processes read queries at once, for as many seconds each.

    Args:
        checkpoint: whose encodings they are.
        payloads: the folder that all read.
        passages: with references; each query of each process draws from them.
        seconds: how long.
        n_processes: how many at once, one number after the other.

    Returns:
        For each number of processes the seconds that each query of each process took, the seconds of CPU of each process,
        and for how long they read.
    """
    file = checkpoint / "passages.json"
    file.write_text(json.dumps([(passage.text, passage.encoding) for passage in passages]))
    command = [sys.executable, "-m", "benchmarks.large_readers", str(checkpoint), str(payloads), str(file), str(seconds)]
    # A thread each: they share the cores already.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    measured = []
    for n in n_processes:
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
        results = [json.loads(reader.communicate()[0]) for reader in readers]
        measured.append({"processes": n, "k": K, "seconds": seconds, **{key: [r[key] for r in results] for key in results[0]}})
    return measured


def read_for(checkpoint: str, payloads: str, passages: str, seconds: float, seed: int) -> None:
    """Read queries and print the seconds of each and those of CPU of all, from when a line comes in."""
    draw = random.Random(seed)
    prepared = [Passage(text, encoding) for text, encoding in json.loads(Path(passages).read_text())]
    # Without a cache: a passage that is drawn again is read again.
    reranker = KalmReranker.from_pretrained(checkpoint, device="cpu", payload_store=payloads, cache_bytes=0)
    reranker.read(prepared[:1])
    print("ready", flush=True)
    sys.stdin.readline()
    latencies, began = [], time.process_time()
    end = time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        reading = reranker.read(draw.sample(prepared, min(K, len(prepared))))
        latencies.append(round(time.perf_counter() - started, 5))
        assert set(reading.statuses) == {"stored"}
    print(json.dumps({"latencies": latencies, "cpu": time.process_time() - began}))


if __name__ == "__main__":
    read_for(*sys.argv[1:4], float(sys.argv[4]), int(sys.argv[5]))
