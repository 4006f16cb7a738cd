"""The codecs `rot4`, `rot3` and `rot2`: rotated differences from the passage's mean state, a few bits a value. NumPy only.

A rotation makes the values of a state look like draws of one normal distribution, whatever its channels were like; for that
the best levels are known (Lloyd 1982, Max 1960). The mean state is stored once, in eight bits a value.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from kalm_integrations.core.passages.rotation import Floats, rotation_of
from kalm_integrations.core.sizes import FEWEST_WITH_MEAN

Bytes = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.float16]

LEVELS = {
    4: (33, 99, 168, 241, 322, 414, 530, 700),
    3: (63, 194, 344, 551),
    2: (116, 387),
}
"""Lloyd and Max's levels of a standard normal, in 256ths, by bits a value; each with both signs."""

UNIT = 256

MEAN_LIMIT = 127
"""Of the mean's whole numbers, on either side of zero. In four bits a large mean shows in every difference: states of Gemma 3
270M, whose mean has ten to twenty times the energy of what differs from it, lose up to 1.6 times as much."""

LARGEST = 2.0**15
"""Of a value that is written in levels; what is larger may leave binary16 with its scale."""

_GRID = 512
"""Steps of a unit on which all thresholds between levels lie: levels are whole 256ths."""


def write(bits: int, states: Floats) -> tuple[Halves, Bytes]:
    """Return the scales and the packed numbers of finite states (n_states, width), those of the mean first.

    The differences are of the mean as it is read, and the scale of a state keeps its length. Scales beyond binary16 are
    infinite.
    """
    rotation = rotation_of(states.shape[1])
    if np.abs(states).max() > LARGEST:
        return np.full(1, np.inf, np.float16), np.zeros(0, np.uint8)
    rotated = rotation.rotate(states) / np.float32(rotation.block)
    scales, packed = [], []
    if len(states) >= FEWEST_WITH_MEAN:
        mean = rotated.mean(0)
        scale = (np.abs(mean).max(keepdims=True) / MEAN_LIMIT).astype(np.float16)
        divisor = scale.astype(np.float32) if scale > 0 else np.ones(1, np.float32)
        mean = np.clip(np.rint(mean / divisor), -MEAN_LIMIT, MEAN_LIMIT)
        rotated -= mean * scale.astype(np.float32)
        scales.append(scale)
        packed.append(mean.astype(np.int8).view(np.uint8))
    scale, levels = _quantize(bits, rotated)
    return np.concatenate([*scales, scale]), np.concatenate([*packed, _pack(bits, levels)])


def read(bits: int, data: Bytes, n_states: int, width: int) -> Floats:
    """Return the states (n_states, width) in what `write` gave: a scale for each row, and its packed levels."""
    rotation = rotation_of(width)
    n_means = int(n_states >= FEWEST_WITH_MEAN)
    split = 2 * (n_means + n_states)
    scales = data[:split].view("<f2").astype(np.float32)[:, None]
    packed = data[split:]
    levels = np.empty((n_means + n_states, rotation.padded_width), np.float32)
    if n_means:
        levels[0] = packed[: rotation.padded_width].view(np.int8)
    _unpack(bits, packed[n_means * rotation.padded_width :], levels[n_means:])
    # Whole numbers, exact, up to here: one rounding for the product and one for the sum, and both are specified.
    states = rotation.undo(levels)
    # Scales may be anything in a damaged string; states that come out as NaN or infinite are refused where they go.
    with np.errstate(invalid="ignore"):
        scales[:n_means] *= UNIT
        states *= scales / np.float32(UNIT * rotation.block)
        if n_means:
            states[1:] += states[0]
    return states[n_means:]


def _quantize(bits: int, rotated: Floats) -> tuple[Halves, Bytes]:
    """Return a scale for each row, with which its levels are as long as the row, and the number of each value's level."""
    lengths = _lengths(rotated)
    roots = lengths[:, None] / np.float32(math.sqrt(rotated.shape[1]))
    steps = np.divide(rotated, roots, out=np.zeros_like(rotated), where=roots > 0)
    steps *= _GRID
    end = _GRID * LEVELS[bits][-1] // UNIT
    np.clip(np.floor(steps, out=steps), -end, end, out=steps)
    levels = _cells(bits).take(steps.astype(np.intp) + end)
    scales = lengths * UNIT / _lengths(_table(bits).take(levels))
    with np.errstate(over="ignore"):
        return scales.astype(np.float16), levels


def _lengths(rows: Floats) -> Floats:
    """Return the Euclidean length of each row."""
    return np.asarray(np.sqrt(np.einsum("ij,ij->i", rows, rows)))


@functools.cache
def _table(bits: int) -> Floats:
    """Return the levels in rising order. Shape: (2 ** bits,)."""
    levels = np.array(LEVELS[bits], np.float32)
    return np.concatenate((-levels[::-1], levels))


@functools.cache
def _cells(bits: int) -> Bytes:
    """Return the number of the level for each step of the grid, from one outermost level to the other."""
    levels = _table(bits)
    end = _GRID * LEVELS[bits][-1] // UNIT
    thresholds = (levels[1:] + levels[:-1]) * (_GRID / UNIT / 2)
    return np.searchsorted(thresholds, np.arange(-end, end + 1), side="right").astype(np.uint8)


def _pack(bits: int, levels: Bytes) -> Bytes:
    """Return numbers of `bits` bits, a multiple of eight in each row, one after the other, lowest bit and first byte first."""
    # Eight numbers make `bits` whole bytes. As float64, in which they are exact, the product is one call.
    words = levels.reshape(-1, 8).astype(np.float64) @ np.exp2(bits * np.arange(8))
    return words.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :bits].ravel()


def _unpack(bits: int, packed: Bytes, levels: Floats) -> None:
    """Put the levels that `_pack` packed the numbers of into an array of their shape."""
    chunk, table = _chunk_table(bits)
    numbers = packed
    if chunk == 12:
        # Two chunks are three bytes.
        first, second, third = (packed[place::3].astype(np.intp) for place in range(3))
        numbers = np.empty((len(first), 2), np.intp)
        np.bitwise_or(first, (second & 15) << 8, out=numbers[:, 0])
        np.bitwise_or(second >> 4, third << 4, out=numbers[:, 1])
    np.take(table, numbers, out=levels.reshape((*numbers.shape, -1)).view(table.dtype)[..., 0], mode="clip")


@functools.cache
def _chunk_table(bits: int) -> tuple[int, npt.NDArray[Any]]:
    """Return how many bits are looked up at once, and for each number of as many the levels in it, as one element."""
    chunk = 8 if 8 % bits == 0 else 12
    numbers = np.arange(2**chunk)[:, None] >> np.arange(0, chunk, bits) & (2**bits - 1)
    levels = _table(bits)[numbers]
    return chunk, levels.view(np.dtype((np.void, levels.itemsize * levels.shape[1]))).ravel()
