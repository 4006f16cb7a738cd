"""A loaded model: tokenizer, encoder and decoder of one checkpoint on one device in one precision, shared by a process."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from weakref import WeakValueDictionary

import torch

from kalm_integrations.core.checkpoint.locate import resolve
from kalm_integrations.core.checkpoint.opened import Checkpoint
from kalm_integrations.core.checkpoint.stamps import folder_stamps
from kalm_integrations.core.checkpoint.tokenization import PromptTokenizer
from kalm_integrations.core.engine import Engine
from kalm_integrations.core.forks import ForkSafeLock
from kalm_integrations.core.model.layers import EmbeddingWeights, StackWeights
from kalm_integrations.core.settings import check_dtype
from kalm_integrations.core.types import shown
from kalm_integrations.errors import SettingsError

logger = logging.getLogger(__name__)


class Runtime:
    """The weights, loaded when first needed. Every method may be called from any thread."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        """Keep what to load; use `get_runtime`, which shares runtimes."""
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self.engine = Engine()
        """Runs the passes, one at a time: each uses all cores, or the whole GPU."""
        self._lock = ForkSafeLock()
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
        with self._lock:
            if allow_special_tokens not in self._tokenizers:
                loaded = self.checkpoint.load_tokenizer()
                self._tokenizers[allow_special_tokens] = PromptTokenizer(loaded, allow_special_tokens=allow_special_tokens)
            return self._tokenizers[allow_special_tokens]

    def embedding(self) -> EmbeddingWeights:
        """Return the token embeddings, loading them the first time."""
        with self._lock:
            if self._embedding is None:
                self._embedding = self.checkpoint.load_embedding(self.device)
            return self._embedding

    def stack(self, side: str) -> StackWeights:
        """Return the layers of the "encoder" or the "decoder", loading them the first time."""
        with self._lock:
            if side not in self._stacks:
                logger.info("loading the %s of %s", side, self.checkpoint.folder)
                self._stacks[side] = self.checkpoint.load_stack(side, self.device, self.dtype)
            return self._stacks[side]


_runtimes: WeakValueDictionary[tuple[object, ...], Runtime] = WeakValueDictionary()
_runtimes_lock = ForkSafeLock()


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
    folder = resolve(model, revision, token)
    # A folder that was written anew is another checkpoint.
    key = (os.path.realpath(folder), folder_stamps(folder), chosen_device, chosen_dtype)
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
    except (RuntimeError, TypeError, ValueError) as error:
        msg = f"device must be a torch device such as 'cpu' or 'cuda:0', but got {shown(device)}"
        raise SettingsError(msg) from error
    if chosen.type == "cpu":
        return torch.device("cpu")
    if chosen.type != "cuda":
        try:
            torch.zeros(1, device=chosen).tolist()
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            # Torch goes on with every backend that it knows.
            why = str(error).partition(". ")[0].partition("\n")[0]
            msg = f"device {device!r} was asked for, but it does not work here ({why}); use device='cpu'"
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
    chosen: torch.dtype = getattr(torch, check_dtype(dtype))
    return chosen
