"""A fixed rotation that spreads what a few channels hold over all of them. NumPy only; `docs/format.md` specifies it.

Sign flips, Hadamard blocks, an exchange between the blocks, sign flips, Hadamard blocks. Nothing is divided on the way, so
that whole numbers stay whole: the inverse of rotated levels is exact in float32, whatever the order of the sums, and gives the
same bits in every implementation.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kalm_integrations.core.sizes import rotated_blocks

Floats = npt.NDArray[np.float32]

_FACTOR = 16
"""A Hadamard matrix of 128 is one of 8 by one of 16: two small products are a fifth of the work of a large one."""


@dataclass(frozen=True)
class Rotation:
    """The rotation of states of one width."""

    width: int
    block: int
    """Values that a Hadamard matrix takes, a power of two."""
    n_blocks: int
    first_signs: Floats
    second_signs: Floats
    """Shape of both: (padded_width,)."""

    @property
    def padded_width(self) -> int:
        """Values of a rotated state: the width, with zeros up to a multiple of the block."""
        return self.block * self.n_blocks

    def rotate(self, states: Floats) -> Floats:
        """Return states (n, width) rotated, (n, padded_width); their length is multiplied by `block`."""
        padded = np.zeros((len(states), self.padded_width), np.float32)
        np.multiply(states, self.first_signs[: self.width], out=padded[:, : self.width])
        spare = np.empty_like(padded)
        self._transform(padded, spare)
        self._exchange(padded, spare, self.n_blocks)
        spare *= self.second_signs
        self._transform(spare, padded)
        return spare

    def undo(self, rotated: Floats) -> Floats:
        """Return the states (n, width) that `rotate` made this of, times the square of `block`; overwrites what is given."""
        spare = np.empty_like(rotated)
        self._transform(rotated, spare)
        rotated *= self.second_signs
        self._exchange(rotated, spare, self.block)
        self._transform(spare, rotated)
        spare *= self.first_signs
        return spare[:, : self.width]

    def _transform(self, rows: Floats, spare: Floats) -> None:
        """Multiply each block of each row by the Hadamard matrix, in place."""
        inner = min(self.block, _FACTOR)
        outer = self.block // inner
        # Row by row: a product of all rows is large enough for NumPy's BLAS to spread it over threads, which wait longer for
        # each other, where PyTorch's threads have the cores, than the product takes.
        by_row = (len(rows), self.padded_width // inner, inner)
        np.matmul(rows.reshape(by_row), _hadamard(inner), out=spare.reshape(by_row))
        np.matmul(_hadamard(outer), spare.reshape(-1, outer, inner), out=rows.reshape(-1, outer, inner))

    def _exchange(self, rows: Floats, target: Floats, n_blocks: int) -> None:
        """Deal the values of each row out over the blocks: what stands in one block gets as many places apart as there are."""
        shape = (len(rows), n_blocks, self.padded_width // n_blocks)
        np.copyto(target.reshape(shape[0], shape[2], shape[1]), rows.reshape(shape).transpose(0, 2, 1))


@functools.lru_cache(64)
def rotation_of(width: int) -> Rotation:
    """Return the rotation of states of a width."""
    block, n_blocks = rotated_blocks(width)
    padded = block * n_blocks
    return Rotation(width, block, n_blocks, _signs(1, padded), _signs(2, padded))


def _signs(which: int, n: int) -> Floats:
    """Return signs: the bits of BLAKE2b digests of `<which>:<count>`, lowest first, where 1 is minus."""
    n_digests = -(-n // 512)
    digests = b"".join(hashlib.blake2b(f"{which}:{count}".encode()).digest() for count in range(n_digests))
    bits = np.unpackbits(np.frombuffer(digests, np.uint8), count=n, bitorder="little")
    return (1 - 2 * bits.astype(np.int8)).astype(np.float32)


@functools.cache
def _hadamard(size: int) -> Floats:
    """Return Sylvester's matrix: minus where the numbers of row and column have an odd number of ones in common."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.ascontiguousarray(matrix)
