"""A loaded model: tokenizer, encoder and decoder of one checkpoint on one device in one precision, shared by a process."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

import torch
from tqdm.auto import tqdm

from kalm_integrations.core import checkpoint as checkpoints
from kalm_integrations.core.checkpoint import Checkpoint
from kalm_integrations.core.decoder import answer_logits, remember_passages
from kalm_integrations.core.encoder import encode
from kalm_integrations.core.layers import EmbeddingWeights, StackConfig, StackWeights
from kalm_integrations.core.pooling import n_pooled_states, pool_states
from kalm_integrations.core.tokenization import PromptTokenizer
from kalm_integrations.errors import NonFiniteScoreError, SettingsError

logger = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}

BATCH_SIZES = {"encode": {"cpu": 16, "cuda": 128}, "score": {"cpu": 16, "cuda": 256}}
"""Passages per batch by device type: on a CPU more do not fit the caches, on a GPU fewer do not fill it."""

_NOT_FINITE_REMEDY = "use dtype='float32', and check the checkpoint if that fails too"

Item = TypeVar("Item", bound=Sized)
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

        size = batch_size or self._batch_size("encode")
        with self.lock, torch.inference_mode():
            return _in_batches(token_ids, encode_batch, size, show_progress)

    def margins(
        self, prompt_ids: list[int], answer_ids: Sequence[int], states: Sequence[torch.Tensor], batch_size: int | None
    ) -> list[float]:
        """Return logit(yes) - logit(no) for one prompt and many passages.

        Args:
            prompt_ids: the whole prompt.
            answer_ids: the tokens of yes and no.
            states: pooled states of each passage. Shape of each: (n_states, hidden).
            batch_size: passages per batch; None chooses by device.

        Raises:
            NonFiniteScoreError: the model produced NaN or infinite logits.
            SettingsError: a token of the prompt has no embedding.
        """
        config = self.checkpoint.decoder_config
        _check_vocabulary([prompt_ids], config)
        embedding, decoder = self.embedding(), self.stack("decoder")
        head = embedding.tokens[list(answer_ids)]
        ids = torch.tensor([prompt_ids], device=self.device)
        last = torch.tensor([len(prompt_ids) - 1], device=self.device)

        def score_batch(batch: list[torch.Tensor]) -> list[float]:
            n_states = torch.tensor([len(rows) for rows in batch], device=self.device)
            padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(self.device)
            memory = remember_passages(padded, n_states, decoder, config)
            logits = answer_logits(memory, ids, last, embedding, decoder, head, config)
            margins: list[float] = (logits[:, 0] - logits[:, 1]).tolist()
            return margins

        size = batch_size or self._batch_size("score")
        with self.lock, torch.inference_mode():
            margins = _in_batches(states, score_batch, size, show_progress=False)
        n_bad = sum(not math.isfinite(margin) for margin in margins)
        if n_bad:
            msg = (
                f"logits must be finite, but {n_bad} of {len(margins)} passages gave NaN or infinity in {self.dtype}; "
                + _NOT_FINITE_REMEDY
            )
            raise NonFiniteScoreError(msg)
        return margins

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


def _in_batches(
    items: Sequence[Item],
    run: Callable[[list[Item]], list[Result]],
    batch_size: int,
    show_progress: bool,
) -> list[Result]:
    """Run over batches of similar length, longest first, and return results in the order of `items`.

    When memory runs out the batch is halved, for the rest of the call too.
    """
    order = sorted(range(len(items)), key=lambda i: -len(items[i]))
    results: dict[int, Result] = {}
    with tqdm(total=len(items), desc="Encoding", unit="passage", disable=not show_progress) as progress:
        while len(results) < len(order):
            batch = order[len(results) : len(results) + batch_size]
            done = None
            try:
                done = run([items[i] for i in batch])
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
            results.update(zip(batch, done, strict=True))
            progress.update(len(batch))
    return [results[i] for i in range(len(items))]


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
