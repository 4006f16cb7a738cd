"""The batched passes over a loaded model: passages to states, and prompts with passages to margins.

Each is `Work` for the engine: it takes items of several callers at once, whose encodings and caches it does not confuse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch.nn.utils.rnn import pad_sequence

from kalm_integrations.core.checkpoint.tokenization import n_shared
from kalm_integrations.core.jobs import Work
from kalm_integrations.core.model.decoder import answer_logits, prefill, project_passages
from kalm_integrations.core.model.encoder import encode
from kalm_integrations.core.model.kv_cache import GatheredKVCache, KVCache, PaddedKVCache
from kalm_integrations.core.model.layers import StackConfig
from kalm_integrations.core.model.pooling import pool_states
from kalm_integrations.core.model.prefix_states import PrefixStates, kept_bytes
from kalm_integrations.core.passages.prefixes import Candidate, Prefix, PrefixKey
from kalm_integrations.core.runtime import Runtime
from kalm_integrations.core.sizes import n_pooled_states
from kalm_integrations.errors import NonFiniteScoreError, SettingsError

BATCH_SIZES = {"encode": {"cpu": 16, "cuda": 128}, "score": {"cpu": 32, "cuda": 256}}
"""Passages per batch by device type: on a CPU more do not fit the caches, on a GPU fewer do not fill it."""

BATCH_TOKENS = {"cpu": 4096, "cuda": 131072}
"""Tokens per encoder batch by device type, padding included: a query waits for one batch of somebody's ingest."""

WITHOUT_PREFIX = 2**60
"""The chunk of passages whose prompts are computed from the first token on."""

_NOT_FINITE_REMEDY = "use dtype='float32', and check the checkpoint if that fails too"

Pair = tuple[int, int]
"""Index of a prompt and index of a passage."""


@dataclass(frozen=True)
class Row:
    """A prompt that is to be answered for a passage."""

    prompt: list[int]
    """Token ids of the whole prompt. Rows of one query share the list."""
    candidate: Candidate
    prefix: Prefix | None
    """The prompt's beginning and where its states are kept; None computes the prompt whole."""


def encode_batch(runtime: Runtime, token_ids: Sequence[list[int]], ratio: int) -> list[torch.Tensor]:
    """Encode and pool passages.

    Args:
        runtime: the loaded model.
        token_ids: of each passage, at least one token each.
        ratio: compression ratio.

    Returns:
        Pooled float32 states of each passage, on the CPU. Shape of each: (ceil(n_tokens / ratio), hidden).
    """
    n_tokens = [len(ids) for ids in token_ids]
    joined = torch.tensor(list(chain.from_iterable(token_ids))).to(runtime.device)
    states = encode(joined, n_tokens, runtime.embedding(), runtime.stack("encoder"), runtime.checkpoint.encoder_config)
    padded = pad_sequence(states.split(n_tokens), batch_first=True)
    pooled = pool_states(padded, torch.tensor(n_tokens, device=runtime.device), ratio).cpu()
    # Cloned, so that a cached passage does not keep its whole batch alive.
    return [row[: n_pooled_states(len(ids), ratio)].clone() for row, ids in zip(pooled, token_ids, strict=True)]


def check_states(states: Sequence[torch.Tensor], runtime: Runtime) -> None:
    """Refuse states that the model has not made of numbers.

    Raises:
        NonFiniteScoreError: some are NaN or infinite.
    """
    if not all(bool(rows.isfinite().all()) for rows in states):
        msg = f"encoder states must be finite, but some are NaN or infinite in {runtime.dtype}; {_NOT_FINITE_REMEDY}"
        raise NonFiniteScoreError(msg)


def score_work(runtime: Runtime, answer_ids: Sequence[int], batch_size: int | None, prefix: Prefix | None) -> Work[Row, float]:
    """Return how margins, logit(yes) - logit(no), are computed.

    Args:
        runtime: the loaded model.
        answer_ids: the tokens of yes and no.
        batch_size: pairs per batch; None chooses by device.
        prefix: of the rows; those of several callers with equal ones are computed together.
    """
    config = runtime.checkpoint.decoder_config

    def score(rows: list[Row]) -> list[float]:
        embedding, decoder = runtime.embedding(), runtime.stack("decoder")
        asked = [row.prompt for row in rows]
        if all(prompt is asked[0] for prompt in asked):
            asked = asked[:1]
        n_cached = 0
        if prefix is not None:
            n_cached = min(min(n_shared(prefix.token_ids, ids), len(ids) - 1) for ids in asked)
        rest = [ids[n_cached:] for ids in asked]
        token_ids = pad_token_ids(rest).to(runtime.device)
        last = torch.tensor([len(ids) - 1 for ids in rest], device=runtime.device)
        cache: KVCache
        if n_cached > 0:
            states = _prefix_states(runtime, rows)
            cache = GatheredKVCache(states, n_cached, runtime.dtype, token_ids.shape[1])
        else:
            cache = _project(runtime, [row.candidate for row in rows])
        head = embedding.tokens[list(answer_ids)]
        logits = answer_logits(cache, token_ids, last, embedding, decoder, head, config)
        margins: list[float] = (logits[:, 0] - logits[:, 1]).tolist()
        return margins

    group = ("score", None if prefix is None else prefix.context)
    return Work(score, batch_size or choose_batch_size("score", runtime), group, length=lambda row: len(row.prompt))


def score_rows(
    runtime: Runtime,
    prompts: Sequence[list[int]],
    candidates: Sequence[Candidate],
    pairs: Sequence[Pair],
    prefix: Prefix | None,
) -> Iterator[tuple[Prefix | None, list[int], list[Row]]]:
    """Yield pairs in the order in which they are best computed: those that use prefix states, then those that do not.

    Args:
        runtime: the loaded model.
        prompts: token ids of each whole prompt.
        candidates: the passages.
        pairs: which prompt is to be answered for which passage.
        prefix: the prompts' common beginning and where its states are kept; None computes every prompt whole.

    Yields:
        The prefix or None, which of the pairs follow, and their rows.

    Raises:
        SettingsError: a token of a prompt has no embedding.
    """
    check_vocabulary(prompts, runtime.checkpoint.decoder_config)
    chunks = [WITHOUT_PREFIX] * len(candidates) if prefix is None else _chunks(runtime, candidates, len(prompts), prefix)

    def key(i: int) -> tuple[int, int, int, int]:
        """Neighbours share a prompt, or have prompts and passages of like length."""
        query, candidate = pairs[i]
        return chunks[candidate], len(prompts[query]), query, -len(candidates[candidate].states)

    order = sorted(range(len(pairs)), key=key)
    for used in (prefix, None) if prefix is not None else (None,):
        chosen = [i for i in order if (chunks[pairs[i][1]] == WITHOUT_PREFIX) == (used is None)]
        if chosen:
            yield used, chosen, [Row(prompts[pairs[i][0]], candidates[pairs[i][1]], used) for i in chosen]


def check_margins(margins: Sequence[float], runtime: Runtime) -> None:
    """Refuse margins that are no numbers.

    Raises:
        NonFiniteScoreError: the model produced NaN or infinite logits.
    """
    n_bad = sum(not math.isfinite(margin) for margin in margins)
    if n_bad:
        msg = (
            f"logits must be finite, but {n_bad} of {len(margins)} passages gave NaN or infinity in {runtime.dtype}; "
            + _NOT_FINITE_REMEDY
        )
        raise NonFiniteScoreError(msg)


def prepare_work(runtime: Runtime, batch_size: int | None) -> Work[Row, None]:
    """Return how prefix states are computed and kept, those that are kept already excepted."""

    def prepare(rows: list[Row]) -> list[None]:
        _prefix_states(runtime, rows)
        return [None] * len(rows)

    return Work(prepare, batch_size or choose_batch_size("score", runtime))


def fetch_prefixes(runtime: Runtime, rows: Sequence[Row]) -> None:
    """Get the prefix states of a request's rows from the store, where there is one."""
    config = runtime.checkpoint.decoder_config
    if rows and rows[0].prefix is not None:
        layout = (len(config.layer_types), config.n_kv_heads, config.head_width)
        rows[0].prefix.fetch([row.candidate for row in rows], layout, runtime.device)


def _project(runtime: Runtime, candidates: Sequence[Candidate]) -> PaddedKVCache:
    """Project the states of passages to keys and values; one that several prompts ask about is projected once."""
    unique = list({candidate.key: candidate for candidate in candidates}.values())
    n_states = torch.tensor([len(candidate.states) for candidate in unique], device=runtime.device)
    padded = pad_sequence([candidate.states for candidate in unique], batch_first=True).to(runtime.device)
    cache = project_passages(padded, n_states, runtime.stack("decoder"), runtime.checkpoint.decoder_config)
    if len(unique) == len(candidates):
        return cache
    position = {candidate.key: index for index, candidate in enumerate(unique)}
    return cache.select(torch.tensor([position[candidate.key] for candidate in candidates], device=runtime.device))


def _prefix_states(runtime: Runtime, rows: Sequence[Row]) -> list[PrefixStates]:
    """Return the prefix states of rows with equal prefixes, computing and keeping those that are not kept.

    Each row's are looked for, and kept, where its own request does.
    """
    config = runtime.checkpoint.decoder_config
    by_request: dict[int, tuple[Prefix, list[Candidate]]] = {}
    for row in rows:
        if row.prefix is not None:
            by_request.setdefault(id(row.prefix), (row.prefix, []))[1].append(row.candidate)
    states: dict[PrefixKey, PrefixStates] = {}
    missing: dict[PrefixKey, Candidate] = {}
    for prefix, candidates in by_request.values():
        found = prefix.find(candidates)
        states |= found
        missing |= {prefix.key(one): one for one in candidates if prefix.key(one) not in found}
    missing = {key: candidate for key, candidate in missing.items() if key not in states}
    if missing:
        token_ids = torch.tensor([prefix.token_ids], device=runtime.device)
        cache = _project(runtime, list(missing.values()))
        cache = prefill(cache, token_ids, runtime.embedding(), runtime.stack("decoder"), config)
        states |= dict(zip(missing, cache.split(prefix.dtype), strict=True))
    for prefix, candidates in by_request.values():
        wanted = {prefix.key(candidate) for candidate in candidates}
        prefix.keep({key: states[key] for key in missing if key in wanted})
    return [states[row.prefix.key(row.candidate)] for row in rows if row.prefix is not None]


def _chunks(runtime: Runtime, candidates: Sequence[Candidate], n_prompts: int, prefix: Prefix) -> list[int]:
    """Return which passages to score together, first those of chunk 0, so that the cache of prefix states serves well.

    Many prompts go through as many passages as the cache holds at a time, so that each prefix is computed once. With one
    prompt each passage is needed once: what the cache cannot hold beside the rest is scored without it (`WITHOUT_PREFIX`),
    instead of pushing out what the next query will ask for.
    """
    config = runtime.checkpoint.decoder_config
    per_token = kept_bytes((len(config.layer_types), 2, config.n_kv_heads, 1, config.head_width), prefix.dtype)
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


def choose_batch_size(kind: str, runtime: Runtime) -> int:
    """Return how many passages to "encode" or "score" at a time."""
    return BATCH_SIZES[kind].get(runtime.device.type, BATCH_SIZES[kind]["cpu"])


def choose_batch_tokens(runtime: Runtime) -> int:
    """Return how many tokens to encode at a time."""
    return BATCH_TOKENS.get(runtime.device.type, BATCH_TOKENS["cpu"])


def check_vocabulary(rows: Sequence[list[int]], config: StackConfig) -> None:
    """Refuse ids beyond the embeddings: on a GPU looking one up would end every later pass of the process.

    Raises:
        SettingsError: a token has no embedding.
    """
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
