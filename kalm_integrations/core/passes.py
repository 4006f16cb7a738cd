"""The batched passes over a loaded model: passages to states, and prompts with passages to margins."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from kalm_integrations.core.batching import progress_bar, run_in_batches
from kalm_integrations.core.checkpoint.tokenization import n_shared
from kalm_integrations.core.model.decoder import answer_logits, prefill, project_passages
from kalm_integrations.core.model.encoder import encode
from kalm_integrations.core.model.kv_cache import GatheredKVCache, KVCache, PaddedKVCache, PrefixStates
from kalm_integrations.core.model.layers import StackConfig
from kalm_integrations.core.model.pooling import n_pooled_states, pool_states
from kalm_integrations.core.passages.prefixes import Candidate, Prefix
from kalm_integrations.core.runtime import Runtime
from kalm_integrations.errors import NonFiniteScoreError, SettingsError

BATCH_SIZES = {"encode": {"cpu": 16, "cuda": 128}, "score": {"cpu": 32, "cuda": 256}}
"""Passages per batch by device type: on a CPU more do not fit the caches, on a GPU fewer do not fill it."""

WITHOUT_PREFIX = 2**60
"""The chunk of passages whose prompts are computed from the first token on."""

_NOT_FINITE_REMEDY = "use dtype='float32', and check the checkpoint if that fails too"

Pair = tuple[int, int]
"""Index of a prompt and index of a passage."""


def encode_tokens(
    runtime: Runtime, token_ids: Sequence[list[int]], ratio: int, batch_size: int | None, *, show_progress: bool = False
) -> list[torch.Tensor]:
    """Encode and pool passages.

    Args:
        runtime: the loaded model.
        token_ids: of each passage, at least one token each.
        ratio: compression ratio.
        batch_size: passages per batch; None chooses by device.
        show_progress: draw a progress bar.

    Returns:
        Pooled float32 states of each passage, in order, on the CPU. Shape of each: (ceil(n_tokens / ratio), hidden).

    Raises:
        NonFiniteScoreError: the model produced NaN or infinite states.
        SettingsError: a token has no embedding.
    """
    config = runtime.checkpoint.encoder_config
    _check_vocabulary(token_ids, config)

    def encode_batch(batch: list[list[int]]) -> list[torch.Tensor]:
        n_tokens = torch.tensor([len(ids) for ids in batch], device=runtime.device)
        padded = pad_token_ids(batch).to(runtime.device)
        states = encode(padded, n_tokens, runtime.embedding(), runtime.stack("encoder"), config)
        pooled = pool_states(states, n_tokens, ratio).cpu()
        if not bool(pooled.isfinite().all()):
            msg = f"encoder states must be finite, but some are NaN or infinite in {runtime.dtype}; {_NOT_FINITE_REMEDY}"
            raise NonFiniteScoreError(msg)
        # Cloned, so that a cached passage does not keep its whole batch alive.
        return [row[: n_pooled_states(len(ids), ratio)].clone() for row, ids in zip(pooled, batch, strict=True)]

    order = sorted(range(len(token_ids)), key=lambda i: -len(token_ids[i]))
    size = batch_size or _batch_size("encode", runtime)
    with runtime.lock, torch.inference_mode(), progress_bar("Encoding", len(order), show_progress) as progress:
        in_order = run_in_batches([token_ids[i] for i in order], encode_batch, size, progress.update)
    states = dict(zip(order, in_order, strict=True))
    return [states[i] for i in range(len(token_ids))]


def compute_margins(
    runtime: Runtime,
    prompts: Sequence[list[int]],
    candidates: Sequence[Candidate],
    pairs: Sequence[Pair],
    answer_ids: Sequence[int],
    batch_size: int | None,
    prefix: Prefix | None = None,
) -> list[float]:
    """Return logit(yes) - logit(no) of prompts for passages.

    Args:
        runtime: the loaded model.
        prompts: token ids of each whole prompt.
        candidates: the passages.
        pairs: which prompt is to be answered for which passage: indices of both.
        answer_ids: the tokens of yes and no.
        batch_size: pairs per batch; None chooses by device.
        prefix: the prompts' common beginning and where its states are kept; None computes every prompt whole.

    Returns:
        The margin of each pair, in order.

    Raises:
        NonFiniteScoreError: the model produced NaN or infinite logits.
        SettingsError: a token of a prompt has no embedding.
    """
    config = runtime.checkpoint.decoder_config
    _check_vocabulary(prompts, config)
    embedding, decoder = runtime.embedding(), runtime.stack("decoder")
    head = embedding.tokens[list(answer_ids)]
    chunks = [0] * len(candidates) if prefix is None else _chunks(runtime, candidates, len(prompts), prefix)

    def score_batch(batch: list[Pair]) -> list[float]:
        asked = [prompts[query] for query, _ in batch]
        if all(prompt is asked[0] for prompt in asked):
            asked = asked[:1]
        n_cached = 0
        if prefix is not None and chunks[batch[0][1]] != WITHOUT_PREFIX:
            n_cached = min(min(n_shared(prefix.token_ids, ids), len(ids) - 1) for ids in asked)
        rest = [ids[n_cached:] for ids in asked]
        token_ids = pad_token_ids(rest).to(runtime.device)
        last = torch.tensor([len(ids) - 1 for ids in rest], device=runtime.device)
        rows = [candidates[index] for _, index in batch]
        cache: KVCache
        if prefix is not None and n_cached > 0:
            states = _prefix_states(runtime, rows, prefix)
            cache = GatheredKVCache(states, n_cached, runtime.dtype, token_ids.shape[1])
        else:
            cache = _project(runtime, rows)
        logits = answer_logits(cache, token_ids, last, embedding, decoder, head, config)
        margins: list[float] = (logits[:, 0] - logits[:, 1]).tolist()
        return margins

    def key(i: int) -> tuple[int, int, int, int]:
        """Neighbours share a prompt, or have prompts and passages of like length."""
        query, candidate = pairs[i]
        return chunks[candidate], len(prompts[query]), query, -len(candidates[candidate].states)

    order = sorted(range(len(pairs)), key=key)
    size = batch_size or _batch_size("score", runtime)
    in_order: list[float] = []
    with runtime.lock, torch.inference_mode():
        for is_whole in (False, True):
            batchable = [pairs[i] for i in order if (chunks[pairs[i][1]] == WITHOUT_PREFIX) == is_whole]
            in_order += run_in_batches(batchable, score_batch, size)
    margins = [margin for _, margin in sorted(zip(order, in_order, strict=True))]
    n_bad = sum(not math.isfinite(margin) for margin in margins)
    if n_bad:
        msg = (
            f"logits must be finite, but {n_bad} of {len(margins)} passages gave NaN or infinity in {runtime.dtype}; "
            + _NOT_FINITE_REMEDY
        )
        raise NonFiniteScoreError(msg)
    return margins


def prepare_prefixes(
    runtime: Runtime, candidates: Sequence[Candidate], prefix: Prefix, batch_size: int | None, *, show_progress: bool = False
) -> None:
    """Compute and keep the prefix states of passages, those that are kept already excepted."""
    _check_vocabulary([list(prefix.token_ids)], runtime.checkpoint.decoder_config)
    ordered = sorted(candidates, key=lambda candidate: -len(candidate.states))

    def prepare_batch(batch: list[Candidate]) -> list[None]:
        _prefix_states(runtime, batch, prefix)
        return [None] * len(batch)

    size = batch_size or _batch_size("score", runtime)
    with runtime.lock, torch.inference_mode(), progress_bar("Prefill", len(ordered), show_progress) as progress:
        run_in_batches(ordered, prepare_batch, size, progress.update)


def _project(runtime: Runtime, rows: Sequence[Candidate]) -> PaddedKVCache:
    """Project the states of passages to keys and values; one that several prompts ask about is projected once."""
    unique = list({id(row): row for row in rows}.values())
    n_states = torch.tensor([len(row.states) for row in unique], device=runtime.device)
    padded = pad_sequence([row.states for row in unique], batch_first=True).to(runtime.device)
    cache = project_passages(padded, n_states, runtime.stack("decoder"), runtime.checkpoint.decoder_config)
    if len(unique) == len(rows):
        return cache
    position = {id(row): index for index, row in enumerate(unique)}
    return cache.select(torch.tensor([position[id(row)] for row in rows], device=runtime.device))


def _prefix_states(runtime: Runtime, rows: Sequence[Candidate], prefix: Prefix) -> list[PrefixStates]:
    """Return the prefix states of passages, computing and keeping those that are not kept."""
    config = runtime.checkpoint.decoder_config
    layout = (len(config.layer_types), config.n_kv_heads, config.head_width)
    states = prefix.find(rows, layout, runtime.device)
    missing = {prefix.key(row): row for row in rows if prefix.key(row) not in states}
    if missing:
        token_ids = torch.tensor([prefix.token_ids], device=runtime.device)
        cache = _project(runtime, list(missing.values()))
        cache = prefill(cache, token_ids, runtime.embedding(), runtime.stack("decoder"), config)
        made = dict(zip(missing, cache.split(prefix.dtype), strict=True))
        prefix.keep(made)
        states |= made
    return [states[prefix.key(row)] for row in rows]


def _chunks(runtime: Runtime, candidates: Sequence[Candidate], n_prompts: int, prefix: Prefix) -> list[int]:
    """Return which passages to score together, first those of chunk 0, so that the cache of prefix states serves well.

    Many prompts go through as many passages as the cache holds at a time, so that each prefix is computed once. With one
    prompt each passage is needed once: what the cache cannot hold beside the rest is scored without it (`WITHOUT_PREFIX`),
    instead of pushing out what the next query will ask for.
    """
    config = runtime.checkpoint.decoder_config
    per_token = 2 * len(config.layer_types) * config.kv_width * prefix.dtype.itemsize
    order = list(range(len(candidates)))
    if n_prompts == 1:
        there = prefix.cache.get_many(map(prefix.key, candidates))
        order.sort(key=lambda index: prefix.key(candidates[index]) not in there)
    chunks, filled = [0] * len(candidates), 0
    for index in order:
        filled += per_token * (len(candidates[index].states) + len(prefix.token_ids))
        overflow = -(-filled // max(prefix.cache.max_bytes, 1)) - 1
        if n_prompts > 1:
            chunks[index] = overflow
        elif overflow and prefix.store is None:
            chunks[index] = WITHOUT_PREFIX
    return chunks


def _batch_size(kind: str, runtime: Runtime) -> int:
    return BATCH_SIZES[kind].get(runtime.device.type, BATCH_SIZES[kind]["cpu"])


def _check_vocabulary(rows: Sequence[list[int]], config: StackConfig) -> None:
    """Refuse ids beyond the embeddings: on a GPU looking one up would end every later pass of the process."""
    highest = max(map(max, rows), default=0)
    if highest >= config.vocabulary_size:
        msg = (
            f"token ids must be below the model's vocabulary of {config.vocabulary_size}, but a text has {highest}: a special "
            "token that the model does not know; leave allow_special_tokens=False, which reads it as text"
        )
        raise SettingsError(msg)


def pad_token_ids(rows: Sequence[list[int]]) -> torch.Tensor:
    """Return token ids as one tensor, padded on the right with zeros. Shape: (rows, longest)."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
