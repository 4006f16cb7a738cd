"""A loaded model: tokenizer, encoder and decoder of one checkpoint on one device in one precision, shared by a process."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar
from weakref import WeakValueDictionary

import torch
from tqdm.auto import tqdm

from kalm_integrations.core import checkpoint as checkpoints
from kalm_integrations.core.checkpoint import Checkpoint
from kalm_integrations.core.decoder import answer_logits, extend, remember_passages
from kalm_integrations.core.encoder import encode
from kalm_integrations.core.layers import EmbeddingWeights, StackConfig, StackWeights
from kalm_integrations.core.memory import FreshMemory, Memory, PrefixStates, RecalledMemory
from kalm_integrations.core.pooling import n_pooled_states, pool_states
from kalm_integrations.core.prefixes import PREFIX_DTYPES, Candidate, Prefix
from kalm_integrations.core.tokenization import PromptTokenizer, n_shared
from kalm_integrations.errors import NonFiniteScoreError, SettingsError

logger = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}

BATCH_SIZES = {"encode": {"cpu": 16, "cuda": 128}, "score": {"cpu": 32, "cuda": 256}}
"""Passages per batch by device type: on a CPU more do not fit the caches, on a GPU fewer do not fill it."""

WHOLE = 2**60
"""The window of passages for which the prompt is computed whole."""

_NOT_FINITE_REMEDY = "use dtype='float32', and check the checkpoint if that fails too"

Pair = tuple[int, int]
"""Index of a prompt and index of a passage."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Runtime:
    """The weights and the passes over them, loaded when first needed. Every method may be called from any thread."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        """Remember what to load; use `get_runtime`, which shares runtimes."""
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        # Re-entrant, because a pass loads weights. One pass at a time: it uses all cores (or the whole GPU) anyway, and
        # two threads that miss the same passage do not both encode it.
        self.lock = threading.RLock()
        self._tokenizers: dict[bool, PromptTokenizer] = {}
        self._embedding: EmbeddingWeights | None = None
        self._stacks: dict[str, StackWeights] = {}

    @property
    def loaded(self) -> tuple[str, ...]:
        """Which sides ("encoder", "decoder") are in memory."""
        return tuple(self._stacks)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory."""
        tensors = [] if self._embedding is None else [self._embedding.tokens, self._embedding.end_of_image]
        for stack in self._stacks.values():
            tensors += [stack.final_norm, *(tensor for layer in stack.layers for tensor in vars(layer).values())]
        return sum(tensor.nbytes for tensor in tensors)

    def tokenizer(self, *, allow_special_tokens: bool) -> PromptTokenizer:
        """Return the tokenizer that reads special-token strings as text, or as control tokens."""
        with self.lock:
            if allow_special_tokens not in self._tokenizers:
                loaded = self.checkpoint.load_tokenizer()
                self._tokenizers[allow_special_tokens] = PromptTokenizer(loaded, allow_special_tokens=allow_special_tokens)
            return self._tokenizers[allow_special_tokens]

    def embedding(self) -> EmbeddingWeights:
        """Return the token embeddings, loading them the first time."""
        with self.lock:
            if self._embedding is None:
                self._embedding = self.checkpoint.load_embedding(self.device)
            return self._embedding

    def stack(self, side: str) -> StackWeights:
        """Return the layers of the "encoder" or the "decoder", loading them the first time."""
        with self.lock:
            if side not in self._stacks:
                logger.info("loading the %s of %s", side, self.checkpoint.folder)
                self._stacks[side] = self.checkpoint.load_stack(side, self.device, self.dtype)
            return self._stacks[side]

    def encode(
        self, token_ids: Sequence[list[int]], ratio: int, batch_size: int | None, *, show_progress: bool = False
    ) -> list[torch.Tensor]:
        """Encode and pool passages.

        Args:
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
        config = self.checkpoint.encoder_config
        _check_vocabulary(token_ids, config)

        def encode_batch(batch: list[list[int]]) -> list[torch.Tensor]:
            n_tokens = torch.tensor([len(ids) for ids in batch], device=self.device)
            padded = pad_token_ids(batch).to(self.device)
            states = encode(padded, n_tokens, self.embedding(), self.stack("encoder"), config)
            pooled = pool_states(states, n_tokens, ratio).cpu()
            if not bool(pooled.isfinite().all()):
                msg = f"encoder states must be finite, but some are NaN or infinite in {self.dtype}; {_NOT_FINITE_REMEDY}"
                raise NonFiniteScoreError(msg)
            # Cloned, so that a cached passage does not keep its whole batch alive.
            return [row[: n_pooled_states(len(ids), ratio)].clone() for row, ids in zip(pooled, batch, strict=True)]

        order = sorted(range(len(token_ids)), key=lambda i: -len(token_ids[i]))
        size = batch_size or self._batch_size("encode")
        with self.lock, torch.inference_mode(), _progress("Encoding", len(order), show_progress) as progress:
            in_order = _in_batches([token_ids[i] for i in order], encode_batch, size, progress.update)
        states = dict(zip(order, in_order, strict=True))
        return [states[i] for i in range(len(token_ids))]

    def margins(
        self,
        prompts: Sequence[list[int]],
        candidates: Sequence[Candidate],
        pairs: Sequence[Pair],
        answer_ids: Sequence[int],
        batch_size: int | None,
        prefix: Prefix | None = None,
    ) -> list[float]:
        """Return logit(yes) - logit(no) of prompts for passages.

        Args:
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
        config = self.checkpoint.decoder_config
        _check_vocabulary(prompts, config)
        embedding, decoder = self.embedding(), self.stack("decoder")
        head = embedding.tokens[list(answer_ids)]

        def score_batch(batch: list[Pair]) -> list[float]:
            asked = [prompts[query] for query, _ in batch]
            if all(prompt is asked[0] for prompt in asked):
                asked = asked[:1]
            n_read = 0
            if prefix is not None and window[batch[0][1]] != WHOLE:
                n_read = min(min(n_shared(prefix.token_ids, ids), len(ids) - 1) for ids in asked)
            rest = [ids[n_read:] for ids in asked]
            token_ids = pad_token_ids(rest).to(self.device)
            last = torch.tensor([len(ids) - 1 for ids in rest], device=self.device)
            rows = [candidates[index] for _, index in batch]
            memory: Memory
            if prefix is not None and n_read > 0:
                recalled = self._recall(rows, prefix)
                memory = RecalledMemory(recalled, n_read, self.dtype, token_ids.shape[1])
            else:
                memory = self._remember(rows)
            logits = answer_logits(memory, token_ids, last, embedding, decoder, head, config)
            margins: list[float] = (logits[:, 0] - logits[:, 1]).tolist()
            return margins

        window = [0] * len(candidates) if prefix is None else self._windows(candidates, len(prompts), prefix)

        def key(i: int) -> tuple[int, int, int, int]:
            """Neighbours share a prompt, or have prompts and passages of like length."""
            query, candidate = pairs[i]
            return window[candidate], len(prompts[query]), query, -len(candidates[candidate].states)

        order = sorted(range(len(pairs)), key=key)
        size = batch_size or self._batch_size("score")
        with self.lock, torch.inference_mode():
            in_order = [
                margin
                for is_whole in (False, True)
                for margin in _in_batches(
                    [pairs[i] for i in order if (window[pairs[i][1]] == WHOLE) == is_whole], score_batch, size
                )
            ]
        margins = [margin for _, margin in sorted(zip(order, in_order, strict=True))]
        n_bad = sum(not math.isfinite(margin) for margin in margins)
        if n_bad:
            msg = (
                f"logits must be finite, but {n_bad} of {len(margins)} passages gave NaN or infinity in {self.dtype}; "
                + _NOT_FINITE_REMEDY
            )
            raise NonFiniteScoreError(msg)
        return margins

    def prepare(
        self, candidates: Sequence[Candidate], prefix: Prefix, batch_size: int | None, *, show_progress: bool = False
    ) -> None:
        """Compute and keep the prefix states of passages, those that are kept already excepted."""
        _check_vocabulary([list(prefix.token_ids)], self.checkpoint.decoder_config)
        ordered = sorted(candidates, key=lambda candidate: -len(candidate.states))

        def prepare_batch(batch: list[Candidate]) -> list[None]:
            self._recall(batch, prefix)
            return [None] * len(batch)

        size = batch_size or self._batch_size("score")
        with self.lock, torch.inference_mode(), _progress("Reading the prompt", len(ordered), show_progress) as progress:
            _in_batches(ordered, prepare_batch, size, progress.update)

    def _remember(self, rows: Sequence[Candidate]) -> FreshMemory:
        """Project the states of passages; one that several prompts ask about is projected once."""
        unique = list({id(row): row for row in rows}.values())
        n_states = torch.tensor([len(row.states) for row in unique], device=self.device)
        padded = torch.nn.utils.rnn.pad_sequence([row.states for row in unique], batch_first=True).to(self.device)
        memory = remember_passages(padded, n_states, self.stack("decoder"), self.checkpoint.decoder_config)
        if len(unique) == len(rows):
            return memory
        position = {id(row): index for index, row in enumerate(unique)}
        return memory.select(torch.tensor([position[id(row)] for row in rows], device=self.device))

    def _recall(self, rows: Sequence[Candidate], prefix: Prefix) -> list[PrefixStates]:
        """Return the prefix states of passages, computing and keeping those that are not there."""
        config = self.checkpoint.decoder_config
        layout = (len(config.layer_types), config.n_kv_heads, config.head_width)
        states = prefix.find(rows, layout, self.device)
        missing = {prefix.key(row): row for row in rows if prefix.key(row) not in states}
        if missing:
            token_ids = torch.tensor([prefix.token_ids], device=self.device)
            memory = self._remember(list(missing.values()))
            memory = extend(memory, token_ids, self.embedding(), self.stack("decoder"), config)
            made = dict(zip(missing, memory.split(prefix.dtype), strict=True))
            prefix.keep(made)
            states |= made
        return [states[prefix.key(row)] for row in rows]

    def _windows(self, candidates: Sequence[Candidate], n_prompts: int, prefix: Prefix) -> list[int]:
        """Return which passages to score together, first those of window 0, so that the cache of prefix states serves well.

        Many prompts go through as many passages as the cache holds at a time, so that each prefix is computed once. With one
        prompt each passage is needed once: what the cache cannot hold beside the rest is scored without it (`WHOLE`),
        instead of pushing out what the next query will ask for.
        """
        config = self.checkpoint.decoder_config
        per_token = 2 * len(config.layer_types) * config.kv_width * prefix.dtype.itemsize
        order = list(range(len(candidates)))
        if n_prompts == 1:
            there = prefix.cache.get_many(map(prefix.key, candidates))
            order.sort(key=lambda index: prefix.key(candidates[index]) not in there)
        windows, filled = [0] * len(candidates), 0
        for index in order:
            filled += per_token * (len(candidates[index].states) + len(prefix.token_ids))
            overflow = -(-filled // max(prefix.cache.max_bytes, 1)) - 1
            if n_prompts > 1:
                windows[index] = overflow
            elif overflow and prefix.store is None:
                windows[index] = WHOLE
        return windows

    def storage_dtype(self, name: str | None) -> torch.dtype:
        """Return what prefix states are kept in; None takes the dtype of the run."""
        return self.dtype if name is None else PREFIX_DTYPES[name]

    def _batch_size(self, kind: str) -> int:
        return BATCH_SIZES[kind].get(self.device.type, BATCH_SIZES[kind]["cpu"])


_runtimes: WeakValueDictionary[tuple[object, ...], Runtime] = WeakValueDictionary()
_runtimes_lock = threading.Lock()


def get_runtime(
    model: str | os.PathLike[str],
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    token: str | None = None,
) -> Runtime:
    """Return the process's one runtime of a checkpoint, device and dtype. It lives as long as somebody uses it.

    Raises:
        SettingsError: the device or the dtype cannot be used.
        CheckpointError: the checkpoint cannot be used.
    """
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, chosen_device)
    folder = checkpoints.resolve(model, revision, token)
    # A folder that was written anew is another checkpoint.
    written = tuple(sorted((p.name, p.stat().st_mtime_ns) for p in folder.glob("*") if p.is_file()))
    key = (os.path.realpath(folder), written, chosen_device, chosen_dtype)
    with _runtimes_lock:
        runtime = _runtimes.get(key)
        if runtime is None:
            runtime = _runtimes[key] = Runtime(Checkpoint.open(Path(folder)), chosen_device, chosen_dtype)
        return runtime


def choose_device(device: str | torch.device | None) -> torch.device:
    """Return the device asked for, or CUDA if there is one, or the CPU.

    Raises:
        SettingsError: it is no device, or it is not there.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        msg = f"device must be a torch device such as 'cpu' or 'cuda:0', but got {device!r}"
        raise SettingsError(msg) from error
    if chosen.type == "cpu":
        return torch.device("cpu")
    if chosen.type != "cuda":
        try:
            torch.zeros(1, device=chosen).tolist()
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            msg = f"device {device!r} was asked for, but it does not work here ({error}); use device='cpu'"
            raise SettingsError(msg) from error
        return chosen
    # One name per device, so that "cuda" and "cuda:0" share their weights; CUDA is not started for that.
    index = chosen.index if chosen.index is not None else torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    if index >= torch.cuda.device_count():
        msg = f"device {device!r} was asked for, but there are {torch.cuda.device_count()} CUDA devices; use device='cpu'"
        raise SettingsError(msg)
    return torch.device("cuda", index)


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Return the dtype asked for, or bfloat16 on CUDA and float32 elsewhere.

    Raises:
        SettingsError: the dtype is not offered.
    """
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        why = "; T5Gemma2 overflows in float16" if name in ("float16", "fp16", "half") else ""
        msg = f"dtype must be one of {', '.join(DTYPES)}, but got {dtype!r}{why}"
        raise SettingsError(msg)
    return DTYPES[name]


def _progress(what: str, n_items: int, is_shown: bool) -> tqdm[NoReturn]:
    return tqdm(total=n_items, desc=what, unit="passage", disable=not is_shown)


def _in_batches(
    items: Sequence[Item],
    run: Callable[[list[Item]], list[Result]],
    batch_size: int,
    report: Callable[[int], object] | None = None,
) -> list[Result]:
    """Run over batches and return all results; when memory runs out the batch is halved, for the rest of the call too."""
    results: list[Result] = []
    while len(results) < len(items):
        batch = list(items[len(results) : len(results) + batch_size])
        done = None
        try:
            done = run(batch)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error) or len(batch) == 1:
                raise
        if done is None:
            # Out here, because inside `except` the traceback would still hold the tensors of the failed batch.
            batch_size = len(batch) // 2
            logger.warning("out of memory with %d passages at a time; going on with %d", len(batch), batch_size)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        results += done
        if report is not None:
            report(len(batch))
    return results


def _is_out_of_memory(error: Exception) -> bool:
    # The CPU allocator raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


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
    length = max(map(len, rows))
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])
