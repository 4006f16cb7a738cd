"""An opened checkpoint: configuration and defaults read and checked, weights loaded when asked for."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from kalm_integrations.core.checkpoint.locate import DEFAULTS_FILE, TOKENIZER_FILES
from kalm_integrations.core.checkpoint.stamps import OpenFiles, hash_file
from kalm_integrations.core.checkpoint.t5gemma2 import (
    EMBEDDING_TENSORS,
    check_shape,
    identity_facts,
    side_tensors,
    stack_config,
    stack_weights,
    tensor_names,
)
from kalm_integrations.core.checkpoint.tensors import TensorReader
from kalm_integrations.core.forks import kept_property
from kalm_integrations.core.model import packing
from kalm_integrations.core.model.layers import EmbeddingWeights, StackConfig, StackWeights
from kalm_integrations.core.settings import MAX_TOKENS, Calibration, Instruction
from kalm_integrations.errors import InvalidCheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class CheckpointDefaults(BaseModel):
    """Contents of a checkpoint's optional `kalm_reranker.json`; unset fields leave the published defaults."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    instruction: Instruction | None = None
    system_instruction: Instruction | None = None
    max_passage_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    max_query_tokens: PositiveInt | None = None
    max_compression_ratio: PositiveInt | None = None
    """The coarsest ratio that the checkpoint was trained for."""
    calibration: Calibration | None = None
    """Used by who asks for it; no default."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, opened but with no weights in memory."""

    folder: Path
    encoder_config: StackConfig
    decoder_config: StackConfig
    defaults: CheckpointDefaults
    is_tied: bool
    _encoder_facts: Mapping[str, Any]
    _reader: TensorReader
    _opened: OpenFiles
    """Configuration and tokenizer; the reader knows the weights."""

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read and check the configuration of a checkpoint folder, and list its tensors.

        Raises:
            InvalidCheckpointError: not a T5Gemma2 checkpoint, one this runtime cannot run exactly, or without readable
                safetensors.
        """
        from transformers import AutoConfig

        path = folder / "config.json"
        # Before anything is read.
        opened = OpenFiles([path, *(folder / name for name in TOKENIZER_FILES)])
        _check_entries(folder)
        if not path.is_file():
            msg = f"a checkpoint folder must hold config.json, but {folder} does not; pass the folder of a T5Gemma2 reranker"
            raise InvalidCheckpointError(msg)
        try:
            model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
        except (OSError, ValueError, RecursionError, AttributeError) as error:
            msg = f"{path} must be a JSON object, but it cannot be parsed ({error}); fetch the checkpoint again"
            raise InvalidCheckpointError(msg) from error
        if model_type != "t5gemma2":
            msg = f"a KaLM reranker is a 't5gemma2' checkpoint, but {path} says model_type={model_type!r}"
            raise InvalidCheckpointError(msg)
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            text, end_of_image = config.encoder.text_config, config.encoder.eoi_token_index
            encoder_config = stack_config(text, end_of_image, path)
            decoder_config = stack_config(config.decoder, end_of_image, path)
            encoder_facts = identity_facts(text, encoder_config)
        except InvalidCheckpointError:
            raise
        except Exception as error:  # transformers raises its own validation classes here, and values can be anything
            msg = f"{path} is not a valid T5Gemma2 configuration: {error}"
            raise InvalidCheckpointError(msg) from error
        return cls(
            folder=folder,
            encoder_config=encoder_config,
            decoder_config=decoder_config,
            defaults=_read_defaults(folder / DEFAULTS_FILE),
            is_tied=bool(config.tie_word_embeddings),
            _encoder_facts=encoder_facts,
            _reader=TensorReader.open(folder),
            _opened=opened,
        )

    @kept_property
    def identity(self) -> str:
        """Hash of everything in the folder that changes an encoding: weights, tokenizer, encoder configuration.

        The content decides, not the place: a hub snapshot and a copy of it agree, on any machine.

        Raises:
            InvalidCheckpointError: a file was deleted or written anew since the checkpoint was opened, or the hub's cache
                has one under the hash of another.
        """
        tokenizer = [self.folder / name for name in TOKENIZER_FILES]
        parts = {
            "weights": self._reader.hashes(),
            "tokenizer": {path.name: hash_file(path) for path in tokenizer if path.is_file()},
            "config": dict(self._encoder_facts),
        }
        self._opened.check()
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @kept_property
    def encoder_bound(self) -> float:
        """How long an encoder state can be, by the final norm; no value in it is larger.

        Means of states keep to it too. Only this norm is read, and its rounding to bfloat16 is allowed for.

        Raises:
            InvalidCheckpointError: it is missing or has the wrong shape.
        """
        width = self.encoder_config.hidden_width
        weight = check_shape(self._side("encoder")("norm.weight"), (width,), "norm.weight").float()
        return math.sqrt(width) * float(((1 + weight).abs() + weight.abs() * 2.0**-8).max())

    def load_tokenizer(self) -> Tokenizer:
        """Load the fast tokenizer, with padding and truncation switched off.

        Raises:
            InvalidCheckpointError: there is no fast tokenizer in the folder, or its files are no longer those that were
                there when the checkpoint was opened.
        """
        from transformers import AutoTokenizer

        self._opened.check()
        try:
            loaded = AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
            backend = loaded.backend_tokenizer
        except Exception as error:  # depends on the tokenizer class that the folder names
            msg = (
                f"{self.folder} must hold a fast tokenizer (tokenizer.json), but it could not be loaded: {error}; "
                "save it there with tokenizer.save_pretrained(folder)"
            )
            raise InvalidCheckpointError(msg) from error
        self._opened.check()
        backend.no_truncation()
        backend.no_padding()
        tokenizer: Tokenizer = backend
        return tokenizer

    def load_embedding(self, device: torch.device) -> EmbeddingWeights:
        """Load the token embeddings in the dtype of the file; encoder and decoder share them.

        Raises:
            InvalidCheckpointError: the checkpoint does not tie its embeddings, or a tensor is missing or misshapen.
        """
        if not self.is_tied:
            msg = (
                f"{self.folder} has tie_word_embeddings=false, but every KaLM reranker ties its embeddings; "
                "a checkpoint with separate ones is not supported"
            )
            raise InvalidCheckpointError(msg)
        config = self.encoder_config
        shape = (config.vocabulary_size, config.hidden_width)
        read = self._side("encoder")
        tensors = [
            check_shape(read(name), part, name) for name, part in zip(EMBEDDING_TENSORS, (shape, shape[1:]), strict=True)
        ]
        return EmbeddingWeights(*(tensor.to(device, copy=True) for tensor in tensors))

    def load_stack(self, side: str, device: torch.device, dtype: torch.dtype) -> StackWeights:
        """Load the layers of the "encoder" or the "decoder" (its embeddings excepted).

        Raises:
            InvalidCheckpointError: a tensor is missing or has the wrong shape.
        """
        config = self.encoder_config if side == "encoder" else self.decoder_config
        read = self._side(side)
        is_packed = packing.can_pack(dtype, device)
        largest = max(config.mlp_width, config.query_width, 2 * config.kv_width) * config.hidden_width
        # Shapes are checked tensor by tensor, later.
        largest = min(largest, self._reader.nbytes)
        # Always in the same place: tensors that come and go between the packed ones would leave holes in memory.
        staging = torch.empty(largest if is_packed else 0, dtype=dtype)

        def convert(tensor: torch.Tensor) -> torch.Tensor:
            if is_packed and tensor.ndim == 2:
                return packing.pack(staging[: tensor.numel()].view_as(tensor).copy_(tensor))
            return tensor.to(device, dtype, copy=True)

        # One tensor at a time: the file's pages are mapped only while a tensor is copied.
        return stack_weights(read, config, convert)

    def text_names(self) -> list[str]:
        """Return the names in the file of all tensors that a reranker consists of: embeddings and both sides' layers.

        Raises:
            InvalidCheckpointError: a tensor is missing.
        """
        needed = [("encoder", name) for name in EMBEDDING_TENSORS]
        for side, config in (("encoder", self.encoder_config), ("decoder", self.decoder_config)):
            needed += [(side, name) for name in side_tensors(config)]
        return [self._reader.first_of(tensor_names(side, name)) for side, name in needed]

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield tensors by their names in the file, as they are stored; None: all, those that are not text included.

        Raises:
            InvalidCheckpointError: a tensor is missing, or holds something else than weights.
        """
        for name in self._reader.names if names is None else names:
            yield name, self._reader.read(name)

    def _side(self, side: str) -> Callable[[str], torch.Tensor]:
        """Return a function that reads a tensor of the "encoder" or "decoder" by its name without prefix."""
        return lambda name: self._reader.read(self._reader.first_of(tensor_names(side, name)))


def _check_entries(folder: Path) -> None:
    """Check that a folder holds files that end: reading a pipe waits for ever, reading a device goes on for ever."""
    for path in folder.glob("*"):
        if path.exists() and not (path.is_file() or path.is_dir()):
            msg = f"a checkpoint consists of plain files, but {path} is a pipe, a socket or a device; remove it"
            raise InvalidCheckpointError(msg)


def _read_defaults(path: Path) -> CheckpointDefaults:
    if not path.is_file():
        return CheckpointDefaults()
    try:
        return CheckpointDefaults.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        msg = f"{path} is not valid: {error}"
        raise InvalidCheckpointError(msg) from error
