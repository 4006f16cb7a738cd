"""`python -m benchmarks.windows`: what the encoder saves by looking through its windows by blocks of queries."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import machine, trials
from benchmarks.rows import progress, timed
from benchmarks.stacks import SHAPE_TEXTS, VOCABULARY, draw_embedding, draw_stack, make_config, pack_stack
from benchmarks.ways import DTYPES
from kalm_integrations.core.model import passage_attention
from kalm_integrations.core.model.encoder import encode

BLOCKS = (256, 128, 64)
LENGTHS = {"nano": (768, 1024), "toy": (16, 24)}
WHOLE = 2**30
"""The block that holds every query."""


@torch.inference_mode()
def measure(shape: str, dtype: str, blocks: Sequence[int], n_passages: int, rounds: int) -> list[dict[str, Any]]:
    """Return the seconds of each round for passages of each length, whole and by blocks of each size."""
    draw = torch.Generator().manual_seed(0)
    config = make_config(shape)
    weights = pack_stack(draw_stack(config, getattr(torch, dtype), draw))
    embedding = draw_embedding(config, draw)
    rows = []
    for length in LENGTHS[shape]:
        token_ids = torch.randint(VOCABULARY, (n_passages * length,), generator=draw)
        n_tokens = [length] * n_passages
        run = partial(encode, token_ids, n_tokens, embedding, weights, config)
        run()
        seconds: dict[int, list[float]] = {block: [] for block in (WHOLE, *blocks)}
        for _ in range(rounds):
            for block, measured in seconds.items():
                with patch.object(passage_attention, "WINDOW_BLOCK", block):
                    wall, _, _ = timed(run, "cpu")
                measured.append(wall)
                progress(f"{dtype} {length} tokens, blocks of {block}: {wall:.2f} s")
        by_block = {"whole" if block == WHOLE else str(block): walls for block, walls in seconds.items()}
        rows.append({"dtype": dtype, "n_tokens": length, "wall": by_block})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = trials.parser("windows", __doc__)
    parser.add_argument("--shape", choices=SHAPE_TEXTS, default="nano")
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS)
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = trials.parse(parser, arguments)
    about = {"machine": machine.describe("cpu"), "shape": options.shape, "passages": options.passages}
    rows = []
    for dtype in DTYPES:
        rows += measure(options.shape, dtype, options.blocks, options.passages, options.rounds)
    trials.write(options.output, {**about, "window": make_config(options.shape).sliding_window, "rows": rows})


if __name__ == "__main__":
    main()
