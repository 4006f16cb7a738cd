"""Checkpoints: an alias, a hub id or a folder becomes tokenizer, configuration and weights.

The only file of the runtime that knows names which are not ours: hub ids, T5Gemma2's configuration fields, a checkpoint's
tensors. Only safetensors are read, tensor by tensor and by name, so the vision tower never enters memory and no code from a
repository is executed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from kalm_integrations.core import packing
from kalm_integrations.core.calibration import Calibration
from kalm_integrations.core.layers import (
    ACTIVATIONS,
    EmbeddingWeights,
    LayerWeights,
    Rope,
    StackConfig,
    StackWeights,
)
from kalm_integrations.errors import CheckpointNotFoundError, InvalidCheckpointError, SettingsError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

BUILT_IN = Path(__file__).parents[1] / "checkpoints"

ALIASES: dict[str, tuple[str, str | None]] = {
    "nano": ("KaLM-Embedding/KaLM-Reranker-V1-Nano", "1d3dcd79115a77b91b2ece798f536880d2115e48"),
    "small": ("KaLM-Embedding/KaLM-Reranker-V1-Small", "e8eaadc957a7ae383a4983a483c2c399f1056cd3"),
    "large": ("KaLM-Embedding/KaLM-Reranker-V1-Large", "bc5cb8fe5a266b6d0b5ffdb9da4c06c950ae242f"),
    "nano-r2": ("KaLM-Embedding/KaLM-Reranker-V1-Nano-R2", "3902d6453ea915007dcbf88fbc8a1d7dd5f8df10"),
    "small-r2": ("KaLM-Embedding/KaLM-Reranker-V1-Small-R2", None),
    "large-r2": ("KaLM-Embedding/KaLM-Reranker-V1-Large-R2", None),
}
"""Alias -> hub id and the revision used by default (None: the newest, where no revision has been verified)."""

BUILT_IN_ALIASES = ("pico",)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Files that transformers builds a tokenizer from; each can change the token ids of a text."""

DEFAULTS_FILE = "kalm_reranker.json"
"""A checkpoint's own defaults; see `CheckpointDefaults`."""

FILES = ("config.json", DEFAULTS_FILE, *TOKENIZER_FILES, "*.safetensors", "*.index.json")
"""What is fetched from the hub: configuration, tokenizer and safetensors; never code, pickles or other formats."""

SIDE_PREFIXES = {
    "encoder": ("model.encoder.text_model.", "model.encoder."),
    "decoder": ("model.decoder.",),
}
"""Tensor prefixes of each side: the module names of transformers >= 5.3, then what `save_pretrained` writes."""

LAYER_TENSORS: dict[str, tuple[str, ...]] = {
    "query": ("self_attn.q_proj.weight",),
    "key_value": ("self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "q_norm": ("self_attn.q_norm.weight",),
    "k_norm": ("self_attn.k_norm.weight",),
    "out": ("self_attn.o_proj.weight",),
    "gate": ("mlp.gate_proj.weight",),
    "up": ("mlp.up_proj.weight",),
    "down": ("mlp.down_proj.weight",),
    "pre_attention_norm": ("pre_self_attn_layernorm.weight",),
    "post_attention_norm": ("post_self_attn_layernorm.weight",),
    "pre_mlp_norm": ("pre_feedforward_layernorm.weight",),
    "post_mlp_norm": ("post_feedforward_layernorm.weight",),
}
"""Our name of a layer's weight -> the checkpoint's names, stacked along the output dimension."""

EMBEDDING_TENSORS = ("embed_tokens.weight", "embed_tokens.eoi_embedding")
"""The encoder's, which the decoder and the output projection share."""

CONFIG_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_activation",
    "rms_norm_eps",
    "query_pre_attn_scalar",
    "sliding_window",
    "layer_types",
    "rope_parameters",
)
"""Encoder fields that change an encoding; they enter the fingerprint."""

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of tensors that hold weights as they are; others are quantised and come with scales."""

LAYER_TYPES = ("full_attention", "sliding_attention")

STATIC_ROPES = ("default", "linear", "llama3", "yarn")
"""RoPE types whose frequencies do not depend on the length of the input."""


class CheckpointDefaults(BaseModel):
    """Contents of a checkpoint's optional `kalm_reranker.json`; unset fields leave the published defaults."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    instruction: str | None = None
    system_instruction: str | None = None
    max_passage_tokens: PositiveInt | None = None
    max_query_tokens: PositiveInt | None = None
    calibration: Calibration | None = None
    """Used by who asks for it; no default."""


def resolve(model: str | os.PathLike[str], revision: str | None = None, token: str | None = None) -> Path:
    """Return the local folder of a checkpoint, fetching it from the hub if need be.

    Args:
        model: an alias (`pico`, `nano`, ...), a hub id (`owner/name`) or a local folder.
        revision: branch, tag or commit of a hub repository; None takes the pinned one of an alias.
        token: for a private repository; None leaves it to huggingface_hub (`HF_TOKEN`, a saved login).

    An alias means the same wherever it is used: a folder of that name in the working directory is `./nano`.

    Raises:
        CheckpointNotFoundError: no such folder or repository, or the hub cannot be reached.
        SettingsError: neither an alias, nor a hub id, nor a folder; or a revision of something without revisions.
    """
    name = os.fspath(model)
    is_local = name in BUILT_IN_ALIASES or (name != "" and name not in ALIASES and Path(name).is_dir())
    if is_local and revision is not None:
        msg = f"revision applies to hub repositories only, but got revision={revision!r} with model={name!r}; leave it out"
        raise SettingsError(msg)
    if name in BUILT_IN_ALIASES:
        return BUILT_IN / name
    if is_local:
        return Path(name)
    if name in ALIASES:
        name, pinned = ALIASES[name]
        return _fetch(name, revision or pinned, token)
    if isinstance(model, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return _fetch(name, revision, token)
    known = ", ".join((*BUILT_IN_ALIASES, *ALIASES))
    if os.sep in name or Path(name).exists():
        msg = f"a local checkpoint must be an existing folder, but got {name!r}; check the path, or use one of: {known}"
        raise CheckpointNotFoundError(msg)
    msg = f"model must be one of {known}, a hub id (owner/name) or a local folder, but got {name!r}"
    raise SettingsError(msg)


def _fetch(repository: str, revision: str | None, token: str | None) -> Path:
    """Return the snapshot folder of a hub repository, from the cache if it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, token=token, allow_patterns=list(FILES)))
    except HFValidationError as error:
        msg = f"model must be a valid hub id (owner/name), an alias or an existing folder, but got {repository!r}: {error}"
        raise SettingsError(msg) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        msg = (
            f"checkpoint {repository!r}{at} is not in the local cache and could not be fetched from the hub "
            f"({type(error).__name__}); check the name and the network, download it on another machine and pass the "
            "folder, or use the built-in checkpoint 'pico'"
        )
        raise CheckpointNotFoundError(msg) from error


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, opened but with no weights in memory."""

    folder: Path
    encoder_config: StackConfig
    decoder_config: StackConfig
    defaults: CheckpointDefaults
    is_tied: bool
    _encoder_fields: Mapping[str, Any]
    _reader: TensorReader

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read and check the configuration of a checkpoint folder, and list its tensors.

        Raises:
            InvalidCheckpointError: not a T5Gemma2 checkpoint, one this runtime cannot run exactly, or without readable
                safetensors.
        """
        from transformers import AutoConfig

        path = folder / "config.json"
        if not path.is_file():
            msg = f"a checkpoint folder must hold config.json, but {folder} does not; pass the folder of a T5Gemma2 reranker"
            raise InvalidCheckpointError(msg)
        try:
            model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
        except (ValueError, AttributeError) as error:
            msg = f"{path} must be a JSON object, but it cannot be parsed ({error}); fetch the checkpoint again"
            raise InvalidCheckpointError(msg) from error
        if model_type != "t5gemma2":
            msg = f"a KaLM reranker is a 't5gemma2' checkpoint, but {path} says model_type={model_type!r}"
            raise InvalidCheckpointError(msg)
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises its own validation classes here
            msg = f"{path} is not a valid T5Gemma2 configuration: {error}"
            raise InvalidCheckpointError(msg) from error
        text = config.encoder.text_config
        return cls(
            folder=folder,
            encoder_config=_stack_config(text, config.encoder.eoi_token_index, path),
            decoder_config=_stack_config(config.decoder, config.encoder.eoi_token_index, path),
            defaults=_read_defaults(folder / DEFAULTS_FILE),
            is_tied=bool(config.tie_word_embeddings),
            _encoder_fields={
                **{field: getattr(text, field) for field in CONFIG_FIELDS},
                "eoi_token_index": config.encoder.eoi_token_index,
            },
            _reader=TensorReader.open(folder),
        )

    @cached_property
    def identity(self) -> str:
        """Hash of everything in the folder that changes an encoding: weights, tokenizer, encoder configuration.

        The content decides, not the place: a hub snapshot and a copy of it agree, on any machine.
        """
        tokenizer = [self.folder / name for name in TOKENIZER_FILES]
        parts = {
            "weights": [_sha256(self._reader.unchanged(path)) for path in self._reader.files],
            "tokenizer": {path.name: _sha256(path) for path in tokenizer if path.is_file()},
            "config": dict(self._encoder_fields),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def load_tokenizer(self) -> Tokenizer:
        """Load the fast tokenizer, with padding and truncation switched off.

        Raises:
            InvalidCheckpointError: there is no fast tokenizer in the folder.
        """
        from transformers import AutoTokenizer

        try:
            loaded = AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
            backend = loaded.backend_tokenizer
        except Exception as error:  # depends on the tokenizer class that the folder names
            msg = (
                f"{self.folder} must hold a fast tokenizer (tokenizer.json), but it could not be loaded: {error}; "
                "save it there with tokenizer.save_pretrained(folder)"
            )
            raise InvalidCheckpointError(msg) from error
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
        read = self._reader.side("encoder")
        tensors = [_checked(read(name), part, name) for name, part in zip(EMBEDDING_TENSORS, (shape, shape[1:]), strict=True)]
        return EmbeddingWeights(*(tensor.to(device, copy=True) for tensor in tensors))

    def load_stack(self, side: str, device: torch.device, dtype: torch.dtype) -> StackWeights:
        """Load the layers of the "encoder" or the "decoder" (its embeddings excepted).

        Raises:
            InvalidCheckpointError: a tensor is missing or has the wrong shape.
        """
        config = self.encoder_config if side == "encoder" else self.decoder_config
        read = self._reader.side(side)
        is_packed = packing.can_pack(dtype, device)
        largest = max(config.mlp_width, config.query_width, 2 * config.kv_width) * config.hidden_width
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
        names = [self._reader.full_name("encoder", name) for name in EMBEDDING_TENSORS]
        for side, config in (("encoder", self.encoder_config), ("decoder", self.decoder_config)):
            names += [self._reader.full_name(side, name) for name in _side_tensors(config)]
        return names

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield tensors by their names in the file, as they are stored; None: all, those that are not text included.

        Raises:
            InvalidCheckpointError: a tensor is missing, or holds something else than weights.
        """
        for name in self._reader.names if names is None else names:
            yield name, self._reader.read(name)


def stack_weights(
    read: Callable[[str], torch.Tensor],
    config: StackConfig,
    convert: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> StackWeights:
    """Assemble one side from tensors named as in `LAYER_TENSORS`.

    Args:
        read: returns the tensor with a name, without the side's prefix.
        config: the side's configuration; every tensor's shape is checked against it.
        convert: applied to each assembled weight (device, dtype).

    Raises:
        InvalidCheckpointError: a tensor has the wrong shape.
    """
    shapes = _weight_shapes(config)
    layers = []
    for index in range(len(config.layer_types)):
        weights = {}
        for ours, theirs in LAYER_TENSORS.items():
            names = [f"layers.{index}.{name}" for name in theirs]
            parts = [_checked(read(name), shapes[part], name) for name, part in zip(names, theirs, strict=True)]
            weights[ours] = convert(torch.cat(parts) if len(parts) > 1 else parts[0])
        layers.append(LayerWeights(**weights))
    final_norm = _checked(read("norm.weight"), (config.hidden_width,), "norm.weight")
    return StackWeights(tuple(layers), convert(final_norm))


class TensorReader:
    """Reads tensors of a single-file or sharded safetensors checkpoint by name."""

    def __init__(self, files: dict[str, Path]) -> None:
        """Take the file of each tensor name; use `open` to find them."""
        self._files = files
        self._written = {path: _written(path) for path in self.files}

    @classmethod
    def open(cls, folder: Path) -> TensorReader:
        """List the tensors of a folder.

        Raises:
            InvalidCheckpointError: no safetensors, a shard that is missing, or a file that cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        # In the order of transformers, should a folder hold both.
        if single.is_file():
            paths = [single]
        elif index.is_file():
            paths = _shards(index)
        else:
            msg = (
                f"{folder} must hold model.safetensors or model.safetensors.index.json, but holds neither; other formats "
                "are not read: convert the weights with save_pretrained(..., safe_serialization=True)"
            )
            raise InvalidCheckpointError(msg)
        files: dict[str, Path] = {}
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    files.update(dict.fromkeys(file.keys(), path))
            except SafetensorError as error:
                msg = f"{path} cannot be read as safetensors ({error}); fetch the checkpoint again"
                raise InvalidCheckpointError(msg) from error
        return cls(files)

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._files)

    @property
    def files(self) -> list[Path]:
        """The weight files, sorted by name."""
        return sorted(set(self._files.values()))

    def unchanged(self, path: Path) -> Path:
        """Return one of the files if it still is what it was when the checkpoint was opened.

        Weights are loaded late: tensors of two checkpoints must not meet in one model, nor under one identity.

        Raises:
            InvalidCheckpointError: it was deleted or written anew.
        """
        if _written(path) != self._written[path]:
            msg = f"{path} must stay as it is while its checkpoint is open, but was deleted or written anew; open it again"
            raise InvalidCheckpointError(msg)
        return path

    def full_name(self, side: str, name: str) -> str:
        """Return the name in the file of a tensor of the "encoder" or "decoder".

        Raises:
            InvalidCheckpointError: it is missing.
        """
        candidates = [prefix + name for prefix in SIDE_PREFIXES[side]]
        full_name = next((candidate for candidate in candidates if candidate in self._files), None)
        if full_name is None:
            msg = (
                f"tensor {' or '.join(candidates)} is missing from the checkpoint; it is incomplete or not a "
                "T5Gemma2 encoder-decoder"
            )
            raise InvalidCheckpointError(msg)
        return full_name

    def read(self, full_name: str) -> torch.Tensor:
        """Read a tensor by its name in the file.

        Raises:
            InvalidCheckpointError: the file cannot be read, or holds something else than weights under that name.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.unchanged(self._files[full_name]), framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(full_name)
        except SafetensorError as error:
            msg = f"tensor {full_name} cannot be read from {self._files[full_name]} ({error}); fetch it again"
            raise InvalidCheckpointError(msg) from error
        if tensor.dtype not in WEIGHT_DTYPES:
            msg = (
                f"tensor {full_name} must hold floating-point numbers of 16 bits or more, but is {tensor.dtype}; "
                "quantised checkpoints are not supported, use the original one"
            )
            raise InvalidCheckpointError(msg)
        return tensor

    def side(self, side: str) -> Callable[[str], torch.Tensor]:
        """Return a function that reads a tensor of the "encoder" or "decoder" by its name without prefix."""
        return lambda name: self.read(self.full_name(side, name))


def _shards(index: Path) -> list[Path]:
    """Return the files that the index of a sharded checkpoint names."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        paths = sorted({index.parent / Path(str(shard)).name for shard in weight_map.values()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        msg = f"{index} must be a JSON object with a 'weight_map', but it is not ({error}); fetch it again"
        raise InvalidCheckpointError(msg) from error
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        msg = f"{index.name} names shards that are not in {index.parent}: {', '.join(missing)}; fetch the checkpoint again"
        raise InvalidCheckpointError(msg)
    return paths


def _side_tensors(config: StackConfig) -> list[str]:
    """Return the names, without prefix, of one side's tensors."""
    layers = range(len(config.layer_types))
    return [f"layers.{i}.{name}" for i in layers for names in LAYER_TENSORS.values() for name in names] + ["norm.weight"]


def _weight_shapes(config: StackConfig) -> dict[str, tuple[int, ...]]:
    hidden, mlp, head = config.hidden_width, config.mlp_width, config.head_width
    norm = (hidden,)
    return {
        "self_attn.q_proj.weight": (config.query_width, hidden),
        "self_attn.k_proj.weight": (config.kv_width, hidden),
        "self_attn.v_proj.weight": (config.kv_width, hidden),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
        "self_attn.o_proj.weight": (hidden, config.query_width),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
        "pre_self_attn_layernorm.weight": norm,
        "post_self_attn_layernorm.weight": norm,
        "pre_feedforward_layernorm.weight": norm,
        "post_feedforward_layernorm.weight": norm,
    }


def _checked(tensor: torch.Tensor, shape: tuple[int, ...], name: str) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        msg = f"tensor {name} must have shape {shape} by config.json, but has {tuple(tensor.shape)}"
        raise InvalidCheckpointError(msg)
    return tensor


def _stack_config(config: Any, eoi_token_id: int, path: Path) -> StackConfig:
    if config.attention_bias:
        msg = f"{path}: attention_bias=true is not supported; T5Gemma2 rerankers have none"
        raise InvalidCheckpointError(msg)
    if config.hidden_activation not in ACTIVATIONS:
        msg = f"{path}: hidden_activation must be one of {', '.join(ACTIVATIONS)}, but is {config.hidden_activation!r}"
        raise InvalidCheckpointError(msg)
    if not set(config.layer_types) <= set(LAYER_TYPES):
        msg = f"{path}: layer_types must be {' or '.join(LAYER_TYPES)}, but are {', '.join(sorted(set(config.layer_types)))}"
        raise InvalidCheckpointError(msg)
    return StackConfig(
        hidden_width=config.hidden_size,
        mlp_width=config.intermediate_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        head_width=config.head_dim,
        layer_types=tuple(config.layer_types[: config.num_hidden_layers]),
        sliding_window=config.sliding_window,
        norm_epsilon=config.rms_norm_eps,
        # attn_logit_softcapping is not read: transformers' T5Gemma2 attention does not apply it either.
        attention_scale=config.query_pre_attn_scalar**-0.5,
        activation=config.hidden_activation,
        ropes={kind: _rope(config, kind, path) for kind in set(config.layer_types)},
        vocabulary_size=config.vocab_size,
        eoi_token_id=eoi_token_id,
        logit_softcap=config.final_logit_softcapping if hasattr(config, "final_logit_softcapping") else None,
    )


def _rope(config: Any, kind: str, path: Path) -> Rope:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters[kind]
    rope_type = parameters["rope_type"]
    if rope_type not in STATIC_ROPES:
        msg = f"{path}: rope_type must be one of {', '.join(STATIC_ROPES)}, but is {rope_type!r} for {kind}"
        raise InvalidCheckpointError(msg)
    if rope_type == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return Rope(1.0 / parameters["rope_theta"] ** exponents, 1.0)
    frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, "cpu", layer_type=kind)
    return Rope(frequencies, scaling)


def _read_defaults(path: Path) -> CheckpointDefaults:
    if not path.is_file():
        return CheckpointDefaults()
    try:
        return CheckpointDefaults.model_validate_json(path.read_bytes())
    except ValidationError as error:
        msg = f"{path} is not valid: {error}"
        raise InvalidCheckpointError(msg) from error


def _written(path: Path) -> int | None:
    """Return when a file was written, in nanoseconds, or None if it is not there."""
    return path.stat().st_mtime_ns if path.is_file() else None


def _sha256(path: Path) -> str:
    """Hash a file; a file of the hub's cache is named after its hash, which saves reading it."""
    target = path.resolve()
    if path.is_symlink() and target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name):
        return target.name
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
