"""The encoder's attention over passages that lie end to end: each token sees its own passage, under a window a part of it.

Passages of one length are computed together. Where matrices are not packed for oneDNN, those of like length are too, padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F

from kalm_integrations.core.model import packing
from kalm_integrations.core.model.layers import StackConfig, StackWeights

WINDOW_BLOCK = 128
"""Queries whose windows are looked through together: fewer see less in vain, but are more calls. By docs/benchmarks.md."""

WHOLE_BLOCK = 512
"""Queries that look at a whole passage together; this bounds the memory that their scores take."""

LIKE = 7 / 8
"""Share of the longest passage of a padded group that each has at least."""


@dataclass(frozen=True)
class Block:
    """Some queries of each passage of a group, and the keys that at least one of them sees."""

    queries: slice
    keys: slice
    bias: torch.Tensor | None
    """Is added to the scores: the least number where a query does not see a key. Shape: (passages or 1, queries, keys)."""


@dataclass(frozen=True)
class Group:
    """Neighbouring passages whose attention is computed together."""

    tokens: slice
    """Where they lie."""
    n_passages: int
    blocks: list[Block]
    padded: torch.Tensor | None
    """Which of the tokens stand where when all passages are as long as the longest, in padding any. None: no padding."""
    real: torch.Tensor | None
    """Which places of `padded` are not padding. None: no padding."""


def group_passages(n_tokens: Sequence[int], kind: str, weights: StackWeights, config: StackConfig) -> list[Group]:
    """Return how passages are grouped in the layers of a kind, one of `StackConfig.layer_types`.

    Args:
        n_tokens: of each passage, the longest first.
        kind: of the layers.
        weights: the encoder's layers.
        config: the encoder's configuration.
    """
    matrix = weights.layers[0].query
    window = config.sliding_window if kind == "sliding_attention" else None
    starts = [0, *accumulate(n_tokens)]
    groups = []
    first = 0
    while first < len(n_tokens):
        least = n_tokens[first] * (1 if matrix.is_mkldnn else LIKE)
        stop = next((i for i in range(first, len(n_tokens)) if n_tokens[i] < least), len(n_tokens))
        lengths = torch.tensor(n_tokens[first:stop])
        blocks = list(_blocks(lengths, window, matrix))
        padded = real = None
        if n_tokens[stop - 1] < n_tokens[first]:
            places = torch.arange(n_tokens[first])
            real = (places < lengths[:, None]).flatten().nonzero()[:, 0].to(matrix.device)
            offsets = torch.tensor(starts[first:stop]) - starts[first]
            padded = (offsets[:, None] + places.clamp(max=lengths[:, None] - 1)).to(matrix.device)
        groups.append(Group(slice(starts[first], starts[stop]), stop - first, blocks, padded, real))
        first = stop
    return groups


def reach(window: int) -> tuple[int, int]:
    """Return how many tokens a window lets a token of the encoder look back, and ahead."""
    return (window + 1) // 2 - 1, window // 2


def attend_passages(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, groups: Sequence[Group], *, are_packed: bool
) -> torch.Tensor:
    """Attend within each passage.

    Args:
        queries: scaled already. Shape: (total, n_heads, head_width).
        keys: shape (total, n_kv_heads, head_width).
        values: same shape as `keys`.
        groups: which tokens make a passage, and which of them sees which.
        are_packed: whether the model's matrices are, so that oneDNN computes products.

    Returns:
        Shape: (total, n_heads * head_width).
    """
    attended = []
    for group in groups:
        q, k, v = (_laid_out(part, group) for part in (queries, keys, values))
        blocks = [
            _attend(q[:, block.queries], k[:, block.keys], v[:, block.keys], block.bias, are_packed=are_packed)
            for block in group.blocks
        ]
        rows = _joined(blocks, 1).flatten(0, 1)
        attended.append(rows if group.real is None else rows[group.real])
    return _joined(attended, 0)


def _blocks(n_tokens: torch.Tensor, window: int | None, matrix: torch.Tensor) -> Iterator[Block]:
    """Yield the blocks of a group for a model of which `matrix` is one."""
    shortest, longest = int(n_tokens[-1]), int(n_tokens[0])
    back, ahead = (longest, longest) if window is None else reach(window)
    size = WINDOW_BLOCK if longest > back + 1 else WHOLE_BLOCK
    for start in range(0, longest, size):
        stop = min(start + size, longest)
        keys = slice(max(0, start - back), min(longest, stop + ahead))
        seen = torch.arange(keys.start, keys.stop)
        ahead_by = seen - torch.arange(start, stop)[:, None]
        sees = ((ahead_by >= -back) & (ahead_by <= ahead))[None]
        if keys.stop > shortest:
            sees = sees & (seen < n_tokens[:, None])[:, None]
        bias = None
        if not bool(sees.all()):
            # Not -infinity: a query in the padding may see nothing at all, and has to stay finite.
            bias = torch.zeros(sees.shape, dtype=matrix.dtype).masked_fill(~sees, torch.finfo(matrix.dtype).min)
            bias = bias.to(matrix.device)
        yield Block(slice(start, stop), keys, bias)


def _laid_out(states: torch.Tensor, group: Group) -> torch.Tensor:
    """Return the group's part of (total, heads, head_width) as (passages, longest, heads, head_width)."""
    states = states[group.tokens]
    if group.padded is not None:
        return states[group.padded]
    return states.unflatten(0, (group.n_passages, -1))


def _attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, *, are_packed: bool
) -> torch.Tensor:
    """Attend from queries (passages, n_queries, heads, width) to keys (passages, n_keys, kv_heads, width)."""
    n_passages, n_queries, n_heads, width = queries.shape
    n_kv_heads = keys.shape[2]
    group = n_heads // n_kv_heads
    if queries.device.type != "cpu" or not (are_packed or queries.dtype == torch.bfloat16):
        keys, values = (part.transpose(1, 2).repeat_interleave(group, dim=1) for part in (keys, values))
        seen = None if bias is None else bias[:, None]
        attended = F.scaled_dot_product_attention(queries.transpose(1, 2), keys, values, attn_mask=seen, scale=1.0)
        return attended.transpose(1, 2).flatten(2)
    # PyTorch's fused attention uses neither oneDNN nor the CPU's bfloat16 units. Heads of a group become rows of one query.
    rows = queries.unflatten(2, (n_kv_heads, group)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    keys, values = (part.transpose(1, 2).flatten(0, 1) for part in (keys, values))
    if queries.dtype == torch.bfloat16:
        scores = torch.bmm(rows, keys.transpose(1, 2))
        _add(scores, bias, n_kv_heads, group)
        attended = torch.bmm(torch.softmax(scores, dim=-1), values)
    else:
        parts = []
        for row, key, value in zip(rows, keys, values, strict=True):
            scores = packing.product(row, key)
            if bias is not None:
                scores.view(n_queries, group, -1).add_(bias[0, :, None])
            parts.append(packing.product(torch.softmax(scores, dim=-1), value.t())[None])
        attended = _joined(parts, 0)
    attended = attended.view(n_passages, n_kv_heads, n_queries, group, width).transpose(1, 2)
    return attended.reshape(n_passages, n_queries, n_heads * width)


def _add(scores: torch.Tensor, bias: torch.Tensor | None, n_kv_heads: int, group: int) -> None:
    """Add a bias (passages or 1, n_queries, n_keys) to scores (passages * kv_heads, n_queries * group, n_keys)."""
    if bias is not None:
        scores.view(-1, n_kv_heads, bias.shape[1], group, bias.shape[2]).add_(bias[:, None, :, None])


def _joined(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
