"""The query decoder: passage states and a prompt in, the two answer logits of the last position out.

T5Gemma2 merges self- and cross-attention: one softmax over [passage keys, prompt keys], both made by the same projections,
passage keys without rotation and outside any window. The decoder is causal, so what a passage contributes (its keys and values
in every layer) does not depend on the prompt, and what a prompt prefix contributes does not depend on what follows it.
A `KVCache` holds both: `project_passages` starts one, `prefill` adds prompt tokens, and `answer_logits` runs the last ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kalm_integrations.core.model.kv_cache import KVCache, PaddedKVCache
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


def project_passages(
    states: torch.Tensor, n_states: torch.Tensor, weights: StackWeights, config: StackConfig
) -> PaddedKVCache:
    """Project passage states, right-padded (batch, width, hidden), into every layer's keys and values."""
    states = states.to(weights.dtype)
    pairs = [project_keys_values(states, layer, config, rope=None) for layer in weights.layers]
    keys, values = zip(*pairs, strict=True)
    return PaddedKVCache(states.shape[1], 0, keys, values, n_states)


def prefill(
    cache: PaddedKVCache,
    token_ids: torch.Tensor,
    embedding: EmbeddingWeights,
    weights: StackWeights,
    config: StackConfig,
) -> PaddedKVCache:
    """Read prompt tokens (batch or 1, n_new) that later calls continue; no hidden state of them is kept."""
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    run_layers(cache, token_ids, None, embedding, weights, config, pairs)
    keys, values = zip(*pairs, strict=True)
    return PaddedKVCache(cache.width, cache.n_prompt + token_ids.shape[1], keys, values, cache.n_states)


def answer_logits(
    cache: KVCache,
    token_ids: torch.Tensor,
    last: torch.Tensor,
    embedding: EmbeddingWeights,
    weights: StackWeights,
    head: torch.Tensor,
    config: StackConfig,
) -> torch.Tensor:
    """Read the last prompt tokens and return the logits of the answers.

    Args:
        cache: passages and prompt prefix.
        token_ids: the rest of the prompt, right-padded. Shape: (batch or 1, n_new).
        last: index of each row's last real token within `token_ids`. Shape: (batch or 1,).
        embedding: the token embeddings.
        weights: the decoder's layers.
        head: the rows of the output projection for the answers. Shape: (n_answers, hidden).
        config: the decoder's configuration.

    Returns:
        float32 logits. Shape: (batch, n_answers).
    """
    x = run_layers(cache, token_ids, last, embedding, weights, config)
    normed = rms_norm(x, weights.final_norm, config.norm_epsilon, weights.dtype)
    logits = F.linear(normed, head.to(weights.dtype)).float()
    if config.logit_softcap is not None:
        capped = torch.tanh(logits / config.logit_softcap) * config.logit_softcap
        # The cap would make a number of infinity, and a score of a broken model.
        logits = capped.masked_fill(logits.isinf(), float("nan"))
    return logits


def run_layers(
    cache: KVCache,
    token_ids: torch.Tensor,
    last: torch.Tensor | None,
    embedding: EmbeddingWeights,
    weights: StackWeights,
    config: StackConfig,
    pairs: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> torch.Tensor:
    """Run all layers over prompt tokens and return their hidden states, (batch, n_new, hidden).

    With `last`, the last layer computes that position only and the result is (batch, hidden). With `pairs`, the keys and
    values of every layer are left there, and the last layer ends with them.
    """
    n_new = token_ids.shape[1]
    x = embedding.embed(token_ids, config, weights.dtype)
    ropes = {k: rope.table(cache.n_prompt, cache.n_prompt + n_new, x.device) for k, rope in config.ropes.items()}
    positions = cache.n_prompt + torch.arange(n_new, device=x.device)[None]
    masks = {kind: _mask(kind, cache, positions, n_new, config.sliding_window) for kind in config.ropes}
    for index, (layer, kind) in enumerate(zip(weights.layers, config.layer_types, strict=True)):
        rope, mask = ropes[kind], masks[kind]
        normed = rms_norm(x, layer.pre_attention_norm, config.norm_epsilon, weights.dtype)
        if last is not None and index == len(weights.layers) - 1:
            keys, values = project_keys_values(normed, layer, config, rope)
            last = last.expand(x.shape[0])
            rows = torch.arange(x.shape[0], device=x.device)
            x, normed = x[rows, last][:, None], normed[rows, last][:, None]
            queries = project_queries(normed, layer, config, (rope[0][last][:, None], rope[1][last][:, None]))
            mask = _mask(kind, cache, cache.n_prompt + last[:, None], n_new, config.sliding_window)
        else:
            queries = project_queries(normed, layer, config, rope)
            keys, values = project_keys_values(normed, layer, config, rope)
        keys, values = cache.append(index, keys, values)
        if pairs is not None:
            pairs.append((keys, values))
            if index == len(weights.layers) - 1:
                break
        queries = queries.expand(keys.shape[0], -1, -1, -1)
        x = finish_layer(x, attend(queries, keys, values, mask, config.attention_scale), layer, config)
    return x if last is None else x[:, 0]


def _mask(kind: str, cache: KVCache, positions: torch.Tensor, n_new: int, window: int | None) -> torch.Tensor | None:
    """Return where the prompt tokens at `positions` (batch or 1, n) may look, or None if everywhere.

    Shape: (batch or 1, n, cache.width + cache.n_prompt + n_new).
    """
    n_prompt = cache.n_prompt + n_new
    distance = positions[..., None] - torch.arange(n_prompt, device=positions.device)
    sees_prompt = distance >= 0
    if kind == "sliding_attention" and window is not None:
        sees_prompt = sees_prompt & (distance < window)
    sees_state = cache.visible_states
    if sees_state is None and bool(sees_prompt.all()):
        return None
    if sees_state is None:
        sees_state = torch.ones(1, cache.width, dtype=torch.bool, device=positions.device)
    batch = max(sees_prompt.shape[0], sees_state.shape[0])
    return torch.cat(
        (
            sees_state[:, None].expand(batch, positions.shape[1], -1),
            sees_prompt.expand(batch, -1, -1),
        ),
        dim=2,
    )
