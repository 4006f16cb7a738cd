"""The passage encoder: token ids in, states after the final norm out."""

from __future__ import annotations

import torch

from kalm_integrations.core.model.layers import (
    EmbeddingWeights,
    StackConfig,
    StackWeights,
    attend,
    finish_layer,
    project_keys_values,
    project_queries,
    rms_norm,
)

QUERY_BLOCK = 128
"""Tokens whose windows are looked through together: fewer see less in vain, but are more calls. By docs/benchmarks.md."""


def encode(
    token_ids: torch.Tensor,
    n_tokens: torch.Tensor,
    embedding: EmbeddingWeights,
    weights: StackWeights,
    config: StackConfig,
) -> torch.Tensor:
    """Run the encoder over a right-padded batch.

    Args:
        token_ids: shape (batch, length).
        n_tokens: real tokens of each row, at least 1. Shape: (batch,).
        embedding: the token embeddings.
        weights: the encoder's layers.
        config: the encoder's configuration.

    Returns:
        Last hidden states, float32; rows are meaningless from `n_tokens` on. Shape: (batch, length, hidden).
    """
    length = token_ids.shape[1]
    x = embedding.embed(token_ids, config, weights.dtype)
    ropes = {kind: rope.table(0, length, x.device) for kind, rope in config.ropes.items()}
    masks = {kind: _mask(kind, n_tokens, length, config.sliding_window) for kind in config.ropes}
    for layer, kind in zip(weights.layers, config.layer_types, strict=True):
        normed = rms_norm(x, layer.pre_attention_norm, config.norm_epsilon, weights.dtype)
        queries = project_queries(normed, layer, config, ropes[kind])
        keys, values = project_keys_values(normed, layer, config, ropes[kind])
        attended = _attend(kind, queries, keys, values, masks[kind], config)
        x = finish_layer(x, attended, layer, config)
    return rms_norm(x, weights.final_norm, config.norm_epsilon, x.dtype)


def _attend(
    kind: str, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, config: StackConfig
) -> torch.Tensor:
    """Attend, under a window by blocks of queries: each to the keys that one of its queries sees, not to all of them.

    Up to the window's own width a mask hides too little for that to pay.
    """
    length, window = queries.shape[1], config.sliding_window
    if kind != "sliding_attention" or window is None or mask is None or length <= window:
        return attend(queries, keys, values, mask, config.attention_scale)
    back, ahead = _reach(window)
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        rows = slice(start, start + QUERY_BLOCK)
        seen = slice(max(0, start - back), start + QUERY_BLOCK + ahead)
        blocks.append(
            attend(queries[:, rows], keys[:, :, seen], values[:, :, seen], mask[:, rows, seen], config.attention_scale)
        )
    return torch.cat(blocks, dim=1)


def _reach(window: int) -> tuple[int, int]:
    """Return how many tokens a window lets a token of the encoder look back, and ahead."""
    return (window + 1) // 2 - 1, window // 2


def _mask(kind: str, n_tokens: torch.Tensor, length: int, window: int | None) -> torch.Tensor | None:
    """Return where attention may look, (batch or 1, length, length), or None if it may look everywhere."""
    is_padded = bool((n_tokens < length).any())
    back, ahead = _reach(window) if kind == "sliding_attention" and window is not None else (length, length)
    is_windowed = length > back + 1
    if not is_padded and not is_windowed:
        return None
    positions = torch.arange(length, device=n_tokens.device)
    mask = (positions < n_tokens[:, None])[:, None, :].expand(-1, length, -1)
    if is_windowed:
        distance = positions[:, None] - positions
        mask = mask & (distance <= back) & (-distance <= ahead)
    return mask
