"""What is kept of a KV cache between queries, and in which precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_LEVELS = 127
"""Of int8, on either side of zero."""
_GROUP = 32
"""Neighbouring features that have a scale in common: one for a whole head makes scores err by a quarter more on average."""


@dataclass(frozen=True)
class PrefixStates:
    """The keys and values of one passage and a prompt prefix, which outlive the query that computed them."""

    n_states: int
    pairs: torch.Tensor
    """Keys and values, passage states first. Shape: (n_layers, 2, n_kv_heads, n_states + n_prompt, head_width)."""
    scales: torch.Tensor | None = None
    """What int8 pairs are multiplied by, in bfloat16, which has the range of float32. Its last dimension is the groups."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that is kept; `kept_parts` says their shapes and dtypes."""
        return (self.pairs,) if self.scales is None else (self.pairs, self.scales)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bound(self) -> float:
        """What no key or value exceeds in magnitude; NaN if one is NaN."""
        least, largest = (self.pairs if self.scales is None else self.scales.float() * (_LEVELS + 1)).aminmax()
        return max(-least.item(), largest.item())

    def to(self, device: torch.device) -> PrefixStates:
        """Return the states on a device."""
        return PrefixStates(self.n_states, *(tensor.to(device) for tensor in self.tensors))

    def write_to(self, target: torch.Tensor, layers: slice) -> None:
        """Write some layers' pairs, of as many tokens as there is room for.

        Args:
            target: shape (n_layers or fewer, 2, n_kv_heads, n_tokens, head_width).
            layers: which ones.
        """
        tokens = slice(target.shape[3])
        target.copy_(self.pairs[layers, :, :, tokens])
        if self.scales is not None:
            # In place and in one dtype: a product of mixed ones copies its input first.
            scales = self.scales[layers, :, :, tokens, :, None].to(target.dtype)
            target.unflatten(-1, (scales.shape[-2], -1)).mul_(scales)


def keep(states: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return keys or values (..., head_width) as they are kept in a dtype: themselves, and for int8 their scales.

    What is not finite stays so: its scale is infinite or NaN, too, and all that is multiplied by it becomes one of the two.
    """
    if dtype != torch.int8:
        return (states.to(dtype),)
    grouped = states.unflatten(-1, (_n_groups(states.shape[-1]), -1)).float()
    # The largest magnitude becomes the last level, also after the scale is rounded. Zeros need something to be divided by.
    scales = (grouped.abs().amax(dim=-1) / _LEVELS).clamp_min(torch.finfo(torch.bfloat16).tiny).bfloat16()
    return (grouped / scales[..., None].float()).round_().to(torch.int8).flatten(-2), scales


def kept_parts(shape: Sequence[int], dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of each of the `PrefixStates.tensors` for pairs of a shape."""
    parts = [(tuple(shape), dtype)]
    return [*parts, ((*shape[:-1], _n_groups(shape[-1])), torch.bfloat16)] if dtype == torch.int8 else parts


def kept_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Return the `PrefixStates.nbytes` for pairs of a shape."""
    return sum(math.prod(part) * kept_in.itemsize for part, kept_in in kept_parts(shape, dtype))


def _n_groups(width: int) -> int:
    """Return how many scales a key or value of a width has."""
    return width // math.gcd(width, _GROUP)
