"""The golden file of format version 1, `data/encodings_v1.json`: values that every later version has to read.

Made by `cd tests && python -m tools.golden`. A release that cannot read the committed file breaks the format's promise, so the
file is extended, and never written anew to make a test pass.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from kalm_integrations import EncodedPassage
from kalm_integrations.core.checkpoint.prompts import passage_text
from kalm_integrations.core.passages.encoding import hash_text
from tools.paths import TESTS

GOLDEN = TESTS / "data" / "encodings_v1.json"

# Codec, tokens, ratio, width and factor: odd widths, a last state that stands for fewer tokens, two int4 groups, and values
# that overflow fp16 and are written as bf16.
SHAPES = [
    *((codec, 5, 2, 3, 1.0) for codec in ("fp32", "fp16", "bf16", "int8", "int4")),
    ("int8", 8, 4, 66, 3.0),
    ("int4", 3, 2, 67, 3.0),
    ("fp16", 1, 1, 2, 1e6),
]


def golden_states(n_states: int, width: int, factor: float) -> torch.Tensor:
    """Return states that are the same on every machine: sevenths between -7 and 7, zero among them."""
    return (torch.arange(n_states * width).view(n_states, width) * 37 % 99 - 49).float() * factor / 7


def make_cases() -> list[dict[str, Any]]:
    cases = []
    for codec, n_tokens, ratio, width, factor in SHAPES:
        text = f"{codec} {width}"
        states = golden_states(-(-n_tokens // ratio), width, factor)
        encoding = EncodedPassage(states, n_tokens, ratio, "0123456789abcdef" * 2, hash_text(passage_text(text)), codec)
        store: dict[str, bytes] = {}
        value, reference = encoding.to_metadata(), encoding.to_metadata(store)
        [(key, entry)] = store.items()
        read = EncodedPassage.from_metadata(value)
        cases.append(
            {
                "text": text,
                "codec": codec,
                "n_tokens": n_tokens,
                "compression_ratio": ratio,
                "written": states.tolist(),
                "value": value,
                "reference": reference,
                "store": {key: entry.hex()},
                "read": read.states.tolist(),
            }
        )
    return cases


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(make_cases(), indent=1) + "\n", encoding="utf-8")
