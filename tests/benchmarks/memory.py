"""Peak memory of a row, each in a process of its own. Linux only: the peak comes from /proc."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.real_shape import read_memory

from benchmarks.plan import SHORT, RowSpec
from benchmarks.rows import BUILDERS, Models
from benchmarks.workload import Workload, make_workload_checkpoint
from kalm_integrations import EncodedPassage, KalmReranker

DTYPE = "float32"


def measure_memory(
    rows: Sequence[tuple[str, int]], workload: Workload, reranker: KalmReranker, passage_tokens: int
) -> list[dict[str, Any]]:
    """Return `name`, `candidates`, `passage_tokens`, `dtype` and `peak_bytes` of rows given as (name, candidates).

    The peak is above what the process had after its imports.
    """
    measured = []
    for name, n in rows:
        encodings = workload.encodings(reranker, passage_tokens, n)
        with tempfile.TemporaryDirectory() as folder:
            task = {
                "name": name,
                "candidates": n,
                "passage_tokens": passage_tokens,
                "checkpoint": str(workload.folder),
                # As strings, so that the process need not load an encoder to have them.
                "encodings": [encoding.to_metadata() for encoding in encodings],
            }
            path = Path(folder) / "task.json"
            path.write_text(json.dumps(task))
            command = [sys.executable, "-m", "benchmarks.memory", str(path)]
            # The allocator's own thresholds, as users have them: the tuned ones trade memory for speed.
            environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
            output = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parents[1]
            ).stdout
            peak = int(output.split()[-1])
        measured.append({"name": name, "dtype": DTYPE, "candidates": n, "passage_tokens": passage_tokens, "peak_bytes": peak})
    return measured


def _peak_here(task: dict[str, Any]) -> int:
    spec = RowSpec(task["name"], DTYPE, SHORT, task["passage_tokens"], task["candidates"], task["candidates"], 1)
    with tempfile.TemporaryDirectory() as folder:
        # Everything that is imported late is imported by this.
        _run(spec, Workload(make_workload_checkpoint("toy", Path(folder))))
    before = read_memory("VmRSS")
    workload = Workload(Path(task["checkpoint"]))
    workload.take_over(spec.passage_tokens, [EncodedPassage.from_metadata(value) for value in task["encodings"]])
    _run(spec, workload)
    return read_memory("VmHWM") - before


def _run(spec: RowSpec, workload: Workload) -> None:
    models = Models(workload, spec.dtype, "cpu", are_peers_tiny=True)
    BUILDERS[spec.name](models, spec).score(0)


if __name__ == "__main__":
    print(_peak_here(json.loads(Path(sys.argv[1]).read_text())))
