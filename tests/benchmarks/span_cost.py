"""`python -m benchmarks.span_cost`: seconds of a query without the sentences of its passages, and with them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import machine, trials
from benchmarks.plan import SHORT
from benchmarks.rows import progress, timed
from benchmarks.ways import DTYPES
from benchmarks.workload import MAKERS, Workload, make_workload_checkpoint
from kalm_integrations import KalmReranker, Passage

POOLED, PREFIX, SPANS = "stored encodings", "prefix states", "with sentences"


def sentences(workload: Workload, options: Any) -> list[str]:
    """Return passages of some sentences each."""
    n_tokens = options.tokens // options.sentences
    parts = workload.passages(n_tokens, options.passages * options.sentences)
    return [
        " ".join(f"{part.capitalize()}." for part in parts[index :: options.passages]) for index in range(options.passages)
    ]


def measure(folder: Path, dtype: str, options: Any) -> dict[str, Any]:
    """Return the seconds of each round by what is asked for."""
    open_one = partial(KalmReranker.from_pretrained, folder, device=options.device, dtype=dtype)
    without_prefixes, with_prefixes = open_one(prefix_cache_bytes=0), open_one()
    workload = Workload(folder)
    texts = sentences(workload, options)
    encodings = [metadata["kalm_encoding"] for metadata in without_prefixes.encode_to_metadata(texts)]
    passages = [Passage(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]
    query, instruction = workload.query(SHORT, 0), workload.instruction(SHORT)
    asked = {
        POOLED: partial(without_prefixes.rank, query, passages, instruction=instruction),
        PREFIX: partial(with_prefixes.rank, query, passages, instruction=instruction),
        SPANS: partial(without_prefixes.rank, query, passages, instruction=instruction, spans=len(passages)),
    }
    for ask in asked.values():
        ask()
    found = sum(len(passage.spans or ()) for passage in asked[SPANS]())
    seconds: dict[str, list[float]] = {way: [] for way in asked}
    for _ in range(options.rounds):
        for way, ask in asked.items():
            seconds[way].append(timed(ask, options.device)[0])
    progress(f"{dtype}: {found} sentences, {seconds[SPANS][-1]:.3f} s with them")
    return {"dtype": dtype, "sentences": found, "wall": seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = trials.parser("span_cost", __doc__)
    parser.add_argument("--shape", choices=MAKERS, default="nano")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--passages", type=int, default=20)
    parser.add_argument("--sentences", type=int, default=6, help="of each passage")
    parser.add_argument("--tokens", type=int, default=256, help="of each passage, about")
    parser.add_argument("--rounds", type=int, default=5)
    options = trials.parse(parser, arguments)
    about = {"machine": machine.describe(options.device), "shape": options.shape, "passages": options.passages}
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_workload_checkpoint(options.shape, Path(temporary) / "checkpoint")
        rows = [measure(folder, dtype, options) for dtype in DTYPES]
    trials.write(options.output, {**about, "rows": rows})


if __name__ == "__main__":
    main()
