"""The golden file of format version 1, `data/encodings_v1.json`: values that every later version has to read.

`cd tests && python -m tools.golden` adds the cases that the file lacks. A release that cannot read the committed file breaks
the format's promise, so what is in it stays as it is: that of `int4`, too, which is not written any more.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from kalm_integrations import EncodedPassage
from kalm_integrations.core.checkpoint.prompts import passage_text
from kalm_integrations.core.passages.strings import hash_text
from kalm_integrations.core.passages.windows import Window
from tools.paths import TESTS

Tokens = int | list[list[int]]

GOLDEN = TESTS / "data" / "encodings_v1.json"

# Codec, tokens, ratio, width and factor: odd widths, a last state that stands for fewer tokens, values that overflow fp16 and
# are written as bf16; of the rotated codecs one block and several, with a mean and without. At width 3 some rotated values are
# halfway between two levels; with a factor of 7 all sums are exact, so that they are on every machine.
SHAPES = [
    *((codec, 5, 2, 3, 1.0) for codec in ("fp32", "fp16", "bf16", "int8")),
    ("int8", 8, 4, 66, 3.0),
    ("fp16", 1, 1, 2, 1e6),
    ("rot4", 7, 8, 640, 1.0),
    ("rot4", 3, 2, 66, 3.0),
    ("rot4", 5, 2, 3, 7.0),
    ("rot4", 9, 4, 129, 0.1),
    ("rot3", 1, 1, 129, 1.0),
    ("rot3", 2, 1, 3, 7.0),
    ("rot3", 3, 1, 66, 0.1),
    ("rot2", 4, 4, 3, 7.0),
    ("rot2", 3, 2, 129, 3.0),
    ("rot2", 6, 2, 66, 0.1),
]
# The same with windows instead of tokens: of each its start, its end and its tokens.
WINDOWED_SHAPES = [
    ("fp16", [[0, 40, 5], [31, 80, 4], [75, 90, 1]], 2, 3, 1.0),
    ("fp32", [[0, 70_000, 3]], 4, 2, 1.0),
    ("rot4", [[0, 300, 9], [280, 500, 7]], 4, 129, 0.1),
]
PLAIN_FACTOR = 0.1
"""With it the first state is one number all through, and the second is zero."""


def golden_states(n_states: int, width: int, factor: float) -> torch.Tensor:
    """Return states that are the same on every machine: sevenths between -7 and 7, zero among them."""
    states = (torch.arange(n_states * width).view(n_states, width) * 37 % 99 - 49).float() * factor / 7
    if factor == PLAIN_FACTOR:
        states[0], states[1] = 1, 0
    return states


def make_case(codec: str, tokens: Tokens, ratio: int, width: int, factor: float) -> dict[str, Any]:
    windows = None if isinstance(tokens, int) else tuple(Window(*window) for window in tokens)
    text = text_of(codec, tokens, width)
    counts = [tokens] if isinstance(tokens, int) else [n_tokens for _, _, n_tokens in tokens]
    states = golden_states(sum(-(-n_tokens // ratio) for n_tokens in counts), width, factor)
    facts = (sum(counts), ratio, "0123456789abcdef" * 2, hash_text(passage_text(text)), codec)
    encoding = EncodedPassage(states, *facts, windows)
    store: dict[str, bytes] = {}
    value, reference = encoding.to_metadata(), encoding.to_metadata(store)
    [(key, entry)] = store.items()
    return {
        "text": text,
        "codec": codec,
        "n_tokens": encoding.n_tokens,
        "compression_ratio": ratio,
        **({} if windows is None else {"windows": tokens}),
        "written": states.tolist(),
        "value": value,
        "reference": reference,
        "store": {key: entry.hex()},
        "read": EncodedPassage.from_metadata(value).states.tolist(),
    }


def text_of(codec: str, tokens: Tokens, width: int) -> str:
    return f"{codec} {width}" if isinstance(tokens, int) else f"{codec} {width}, {len(tokens)} windows"


def extended(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return cases with those behind them that they lack."""
    present = {case["text"] for case in cases}
    shapes: list[tuple[str, Tokens, int, int, float]] = [*SHAPES, *WINDOWED_SHAPES]
    return cases + [make_case(*shape) for shape in shapes if text_of(shape[0], shape[1], shape[3]) not in present]


if __name__ == "__main__":
    golden = extended(json.loads(GOLDEN.read_text(encoding="utf-8")))
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
