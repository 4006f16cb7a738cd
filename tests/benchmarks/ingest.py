"""`python -m benchmarks.ingest`: passages from texts to metadata, and what share of the floor that is."""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, trials
from benchmarks.floor import floor_seconds, measure_rates
from benchmarks.ways import DTYPES
from benchmarks.workload import MAKERS, Workload, make_workload_checkpoint
from kalm_integrations import KalmReranker
from kalm_integrations.core.openmp import release_helpers
from kalm_integrations.planning.arithmetic import Widths, encoder_multiply_adds

MIXED = "64 to 1,024"
SETS: dict[str, tuple[int, int]] = {MIXED: (64, 1024), "256": (256, 256), "1,024": (1024, 1024)}
"""The shortest and the longest of the passages, in tokens; between them lengths are drawn evenly."""


def measure(folder: Path, dtype: str, options: Any) -> list[dict[str, Any]]:
    """Return the seconds of each round for each set of passages, and the floor of each round."""
    workload = Workload(folder)
    reranker = KalmReranker.from_pretrained(folder, device=options.device, dtype=dtype, cache_bytes=0, prefix_cache_bytes=0)
    widths = Widths.of(reranker.runtime.checkpoint.encoder_config)
    draw = random.Random(0)
    rows = []
    for name, (shortest, longest) in SETS.items():
        n_passages = options.passages if name == MIXED else max(1, options.passages * 512 // longest)
        lengths = [draw.randint(shortest, longest) for _ in range(n_passages)]
        texts = [text for length, n in Counter(lengths).items() for text in workload.passages(length, n)]
        draw.shuffle(texts)
        work = sum_of([encoder_multiply_adds(widths, 1, length) for length in lengths])
        about = {"dtype": dtype, "tokens": name, "passages": n_passages, "total_tokens": sum(lengths), "multiply_adds": work}
        rows.append({**about, "texts": texts, "wall": [], "cpu": []})
    rates: dict[str, float] = {}
    reranker.encode_to_metadata(rows[0]["texts"][:2])
    for _ in range(options.rounds):
        found = measure_rates(widths, dtype, options.device, options.seconds)
        rates = {product: max(rate, rates.get(product, 0.0)) for product, rate in found.items()}
        for row in rows:
            # As `kalm encode` does; measuring the floor has left some.
            release_helpers()
            wall, cpu = time.perf_counter(), time.process_time()
            reranker.encode_to_metadata(row["texts"])
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            row["wall"].append(wall)
            row["cpu"].append(cpu)
            progress(f"{dtype} {row['tokens']} tokens: {wall:.2f} s, {row['total_tokens'] / wall:,.0f} tokens a second")
    for row in rows:
        del row["texts"]
        row["floor"] = floor_seconds(row["multiply_adds"], rates)
        progress(f"{dtype} {row['tokens']} tokens: {row['floor'] / min(row['wall']):.3f} of the floor at best")
    return [{**row, "rates": rates} for row in rows]


def sum_of(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    """Return the sum of multiply-adds by product."""
    return {product: sum(each[product] for each in counts) for product in counts[0]}


def progress(message: str) -> None:
    """Say how far the measurement has come."""
    print(message, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = trials.parser("ingest", __doc__)
    parser.add_argument("--shape", choices=MAKERS, default="nano")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--passages", type=int, default=32, help="of mixed lengths; about as many tokens in the other sets")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2, help="for each product of the floor, each round")
    options = trials.parse(parser, arguments)
    about = {"machine": machine.describe(options.device), "shape": options.shape, "rounds": options.rounds}
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_workload_checkpoint(options.shape, Path(temporary) / "checkpoint")
        rows = [row for dtype in options.dtypes for row in measure(folder, dtype, options)]
    if torch.cuda.is_available():
        about["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    trials.write(options.output, {**about, "rows": rows})


if __name__ == "__main__":
    main()
