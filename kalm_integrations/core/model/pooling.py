"""Matryoshka embedding pooling (MEP): means over consecutive groups of encoder states."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kalm_integrations.core.sizes import n_pooled_states
from kalm_integrations.errors import SettingsError


def pool_states(states: torch.Tensor, n_tokens: torch.Tensor, compression_ratio: int) -> torch.Tensor:
    """Average each group of `compression_ratio` consecutive states, counting real tokens only.

    Groups start at position 0; the last group of a passage is the mean of the tokens it really has.

    Args:
        states: encoder states, right-padded. Shape: (batch, length, hidden).
        n_tokens: number of real tokens of each passage. Shape: (batch,).
        compression_ratio: states per group; 1 returns the states with the padding set to zero.

    Returns:
        Pooled states; groups without a real token are zero. Shape: (batch, ceil(length / ratio), hidden).
    """
    batch, length, hidden = states.shape
    n_groups = n_pooled_states(length, compression_ratio)
    is_token = torch.arange(n_groups * compression_ratio, device=states.device) < n_tokens[:, None]
    states = F.pad(states, (0, 0, 0, n_groups * compression_ratio - length))
    states = states.masked_fill(~is_token[..., None], 0)
    counts = is_token.view(batch, n_groups, compression_ratio).sum(2).clamp(min=1)
    grouped = states.view(batch, n_groups, compression_ratio, hidden)
    return grouped.sum(2) / counts[..., None].to(states.dtype)


def repool_states(states: torch.Tensor, n_tokens: int, ratio: int, coarser_ratio: int) -> torch.Tensor:
    """Pool states that are already pooled, exactly as if the tokens had been pooled at `coarser_ratio`.

    Each state stands for `ratio` tokens, except the last, which stands for the rest; the mean is weighted by that.

    Args:
        states: states pooled at `ratio`. Shape: (n_states, hidden).
        n_tokens: number of tokens the passage had.
        ratio: compression ratio of `states`.
        coarser_ratio: a multiple of `ratio`.

    Returns:
        Shape: (ceil(n_tokens / coarser_ratio), hidden).

    Raises:
        SettingsError: `coarser_ratio` is not a positive multiple of `ratio`.
    """
    if coarser_ratio < ratio or coarser_ratio % ratio:
        msg = (
            f"the new compression ratio must be a multiple of the stored one, {ratio}, but got {coarser_ratio}; "
            "encode the passage again for a ratio that is not"
        )
        raise SettingsError(msg)
    if coarser_ratio == ratio:
        return states
    weights = states.new_full((states.shape[0], 1), ratio)
    weights[-1] = n_tokens - ratio * (states.shape[0] - 1)
    # No larger than the passage: a group that takes in all states needs no more padding than that.
    factor = min(coarser_ratio // ratio, states.shape[0])
    padding = -states.shape[0] % factor
    sums = F.pad(states * weights, (0, 0, 0, padding)).view(-1, factor, states.shape[1]).sum(1)
    return sums / F.pad(weights, (0, 0, 0, padding)).view(-1, factor, 1).sum(1)
