"""The passage encoder: token ids in, states after the final norm out.

Passages lie end to end, without padding, so that the products, norms and rotations see real tokens only. Attention goes
through groups of passages of like length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kalm_integrations.core.model.layers import (
    EmbeddingWeights,
    StackConfig,
    StackWeights,
    finish_layer,
    project_keys_values,
    project_queries,
    rms_norm,
)
from kalm_integrations.core.model.passage_attention import attend_passages, group_passages


def encode(
    token_ids: torch.Tensor,
    n_tokens: Sequence[int],
    embedding: EmbeddingWeights,
    weights: StackWeights,
    config: StackConfig,
) -> torch.Tensor:
    """Run the encoder over passages that lie end to end.

    Args:
        token_ids: of all passages, one after the other. Shape: (total,).
        n_tokens: of each passage, at least 1.
        embedding: the token embeddings.
        weights: the encoder's layers.
        config: the encoder's configuration.

    Returns:
        Last hidden states, float32. Shape: (total, hidden).
    """
    # Those of like length are neighbours, and so make groups.
    order = sorted(range(len(n_tokens)), key=lambda index: -n_tokens[index])
    is_sorted = order == list(range(len(n_tokens)))
    if not is_sorted:
        passages = token_ids.split(list(n_tokens))
        token_ids = torch.cat([passages[index] for index in order])
    lengths = [n_tokens[index] for index in order]
    x = embedding.embed(token_ids[None], config, weights.dtype)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(x.device)
    tables = {kind: rope.table(0, lengths[0], x.device) for kind, rope in config.ropes.items()}
    ropes = {kind: tuple(part[positions].to(weights.dtype) for part in table) for kind, table in tables.items()}
    # A query's factor on the scores is that of its rotation.
    scaled = {kind: tuple(part * config.attention_scale for part in rope) for kind, rope in ropes.items()}
    groups = {kind: group_passages(lengths, kind, weights, config) for kind in config.ropes}
    for layer, kind in zip(weights.layers, config.layer_types, strict=True):
        normed = rms_norm(x, layer.pre_attention_norm, config.norm_epsilon, weights.dtype)
        queries = project_queries(normed, layer, config, scaled[kind])
        keys, values = (part[0].transpose(0, 1) for part in project_keys_values(normed, layer, config, ropes[kind]))
        attended = attend_passages(queries[0], keys, values, groups[kind], are_packed=layer.query.is_mkldnn)
        x = finish_layer(x, attended[None], layer, config)
    states = rms_norm(x, weights.final_norm, config.norm_epsilon, x.dtype)[0]
    if is_sorted:
        return states
    rows = states.split(lengths)
    place = {index: rank for rank, index in enumerate(order)}
    return torch.cat([rows[place[index]] for index in range(len(order))])
