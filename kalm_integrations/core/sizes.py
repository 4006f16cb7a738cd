"""How many states a passage has, and how many bytes its payload: what is known of an encoding before it is read."""

from __future__ import annotations

import functools
from collections.abc import Callable

INT4_GROUP = 64
"""Values that share a scale in int4."""

FEWEST_WITH_MEAN = 3
"""States from which on codecs that rotate store the mean: what differs from it is a half to a tenth of real states' energy."""

_SMALLEST_BLOCK, _LARGEST_BLOCK = 8, 128


def n_pooled_states(n_tokens: int, compression_ratio: int) -> int:
    """Return how many pooled states `n_tokens` encoder states become."""
    return -(-n_tokens // compression_ratio)


def rotated_blocks(width: int) -> tuple[int, int]:
    """Return the size and the number of the blocks in which states of a width are rotated, padded with zeros."""
    block = min(max(1 << (width - 1).bit_length(), _SMALLEST_BLOCK), _LARGEST_BLOCK)
    return block, -(-width // block)


def _rotated_bytes(bits: int, n_states: int, width: int) -> int:
    """Return the bytes of rotated states: a scale for each row, and its packed levels."""
    block, n_blocks = rotated_blocks(width)
    padded = block * n_blocks
    n_means = int(n_states >= FEWEST_WITH_MEAN)
    return n_means * (2 + padded) + n_states * (2 + padded * bits // 8)


PAYLOAD_BYTES: dict[str, Callable[[int, int], int]] = {
    "fp32": lambda n_states, width: 4 * n_states * width,
    "fp16": lambda n_states, width: 2 * n_states * width,
    "bf16": lambda n_states, width: 2 * n_states * width,
    "int8": lambda n_states, width: n_states * (width + 2),
    **{f"rot{bits}": functools.partial(_rotated_bytes, bits) for bits in (4, 3, 2)},
    "int4": lambda n_states, width: n_states * (-(-width // 2) + 2 * -(-width // INT4_GROUP)),
}
"""Bytes of (n_states, width), by codec: of all that can be read."""
