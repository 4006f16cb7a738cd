"""`python -m benchmarks.batches`: speed and memory of a GPU by batch size, passages from text to metadata and queries."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, trials
from benchmarks.rows import progress, timed
from benchmarks.workload import MAKERS, Workload, make_workload_checkpoint
from kalm_integrations import KalmReranker

SIZES = (16, 32, 64, 128, 256, 512)


def measure(folder: Path, dtype: str, options: Any) -> list[dict[str, Any]]:
    """Return for each batch size the seconds of each round and the most memory that tensors took."""
    workload = Workload(folder)
    texts = workload.passages(options.tokens, options.passages)
    rows = []
    for size in options.sizes:
        # Models have cycles; the next one needs their memory.
        gc.collect()
        sizes = {"encode_batch_size": size, "score_batch_size": size, "cache_bytes": 0, "prefix_cache_bytes": 0}
        reranker = KalmReranker.from_pretrained(folder, device=options.device, dtype=dtype, **sizes)
        reranker.warm_up()
        loaded = _reset(options.device)
        encode = partial(reranker.encode_passages, texts)
        encodings = encode()
        encoding, encoding_peak = _rounds(encode, options)
        scoring, scoring_peak = _rounds(partial(reranker.score, "Which team won?", encodings), options)
        rows.append(
            {"dtype": dtype, "size": size, "loaded": loaded, "encode": encoding, "encode_peak": encoding_peak}
            | {"score": scoring, "score_peak": scoring_peak}
        )
        progress(f"{dtype}, {size}: {len(texts) / min(encoding):.0f} passages/s, {min(scoring):.3f} s a query")
    return rows


def _rounds(work: Callable[[], object], options: Any) -> tuple[list[float], int]:
    """Return the seconds of each round, and the peak of memory; 0 on a CPU."""
    work()
    _reset(options.device)
    seconds = [timed(work, options.device)[0] for _ in range(options.rounds)]
    return seconds, 0 if options.device == "cpu" else torch.cuda.max_memory_allocated()


def _reset(device: str) -> int:
    """Forget the peak of memory, and return what is allocated."""
    if device == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = trials.parser("batches", __doc__)
    parser.add_argument("--shape", choices=MAKERS, default="nano")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--passages", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=256, help="of each passage")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    options = trials.parse(parser, arguments)
    about = {"machine": machine.describe(options.device), "shape": options.shape}
    about |= {"passages": options.passages, "tokens": options.tokens}
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_workload_checkpoint(options.shape, Path(temporary) / "checkpoint")
        rows = [row for dtype in options.dtypes for row in measure(folder, dtype, options)]
    trials.write(options.output, {**about, "rows": rows})


if __name__ == "__main__":
    main()
