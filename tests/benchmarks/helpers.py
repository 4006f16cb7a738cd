"""`python -m benchmarks.helpers`: passages for a caller whose helper threads sleep, and for one without."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, trials
from benchmarks.helpers_page import KEPT, RELEASED
from benchmarks.rows import progress, timed
from benchmarks.ways import DTYPES
from benchmarks.workload import MAKERS, Workload, make_workload_checkpoint
from kalm_integrations import KalmReranker
from kalm_integrations.core.openmp import release_helpers


def measure(folder: Path, dtype: str, options: Any) -> dict[str, Any]:
    """Return the seconds of each round, by what becomes of the helpers of the thread that asks."""
    reranker = KalmReranker.from_pretrained(folder, device="cpu", dtype=dtype, cache_bytes=0)
    texts = Workload(folder).passages(options.tokens, options.passages)
    encode = partial(reranker.encode_to_metadata, texts)
    encode()
    seconds: dict[str, list[float]] = {KEPT: [], RELEASED: []}
    for _ in range(options.rounds):
        for way, measured in seconds.items():
            # What loading a model does.
            torch.ones(2**20).sum()
            if way == RELEASED:
                release_helpers()
            measured.append(timed(encode, "cpu")[0])
        progress(f"{dtype}: {seconds[KEPT][-1]:.3f} s kept, {seconds[RELEASED][-1]:.3f} s let go")
    return {"dtype": dtype, "passages": options.passages, "tokens": options.tokens, "wall": seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = trials.parser("helpers", __doc__)
    parser.add_argument("--shape", choices=MAKERS, default="nano")
    parser.add_argument("--passages", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256, help="of each passage")
    parser.add_argument("--rounds", type=int, default=5)
    options = trials.parse(parser, arguments)
    about = {"machine": machine.describe("cpu"), "shape": options.shape}
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_workload_checkpoint(options.shape, Path(temporary) / "checkpoint")
        rows = [measure(folder, dtype, options) for dtype in DTYPES]
    trials.write(options.output, {**about, "rows": rows})


if __name__ == "__main__":
    main()
