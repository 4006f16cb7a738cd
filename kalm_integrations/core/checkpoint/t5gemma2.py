"""What T5Gemma2 means to us: the checkpoint's tensor names and configuration fields, and our names for them.

The only module of the core that knows names which are not ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kalm_integrations.core.model.layers import ACTIVATIONS, LayerWeights, Rope, StackConfig, StackWeights
from kalm_integrations.errors import InvalidCheckpointError

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

LAYER_TYPES = ("full_attention", "sliding_attention")

MAX_WIDTH = 2**20
"""Of whatever config.json gives the size of; checked before anything of that size is made."""

MAX_TOKEN_ID = 2**31

STATIC_ROPES = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "rope_theta",
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "truncate",
    ),
}
"""RoPE types whose frequencies do not depend on the length of the input, and the numbers that they depend on."""


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
    shapes = weight_shapes(config)
    layers = []
    for index in range(len(config.layer_types)):
        weights = {}
        for ours, theirs in LAYER_TENSORS.items():
            names = [f"layers.{index}.{name}" for name in theirs]
            parts = [check_shape(read(name), shapes[part], name) for name, part in zip(names, theirs, strict=True)]
            weights[ours] = convert(torch.cat(parts) if len(parts) > 1 else parts[0])
        layers.append(LayerWeights(**weights))
    final_norm = check_shape(read("norm.weight"), (config.hidden_width,), "norm.weight")
    return StackWeights(tuple(layers), convert(final_norm))


def tensor_names(side: str, name: str) -> list[str]:
    """Return the names that a tensor of the "encoder" or "decoder" may have in a file, given its name without prefix."""
    return [prefix + name for prefix in SIDE_PREFIXES[side]]


def side_tensors(config: StackConfig) -> list[str]:
    """Return the names, without prefix, of one side's tensors."""
    layers = range(len(config.layer_types))
    return [f"layers.{i}.{name}" for i in layers for names in LAYER_TENSORS.values() for name in names] + ["norm.weight"]


def weight_shapes(config: StackConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a layer, by its name without the layer's prefix."""
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


def check_shape(tensor: torch.Tensor, shape: tuple[int, ...], name: str) -> torch.Tensor:
    """Return a tensor if it has the shape that config.json demands.

    Raises:
        InvalidCheckpointError: it has not.
    """
    if tuple(tensor.shape) != shape:
        msg = f"tensor {name} must have shape {shape} by config.json, but has {tuple(tensor.shape)}"
        raise InvalidCheckpointError(msg)
    return tensor


def stack_config(config: Any, eoi_token_id: int, path: Path) -> StackConfig:
    """Return one side's configuration.

    Args:
        config: what transformers makes of that side's part of config.json.
        eoi_token_id: the token whose embedding lies apart.
        path: of config.json, for messages.

    Raises:
        InvalidCheckpointError: this runtime cannot run it exactly.
    """
    if config.attention_bias:
        msg = f"{path}: attention_bias=true is not supported; T5Gemma2 rerankers have none"
        raise InvalidCheckpointError(msg)
    if config.hidden_activation not in ACTIVATIONS:
        msg = f"{path}: hidden_activation must be one of {', '.join(ACTIVATIONS)}, but is {config.hidden_activation!r}"
        raise InvalidCheckpointError(msg)
    if not set(config.layer_types) <= set(LAYER_TYPES):
        msg = f"{path}: layer_types must be {' or '.join(LAYER_TYPES)}, but are {', '.join(sorted(set(config.layer_types)))}"
        raise InvalidCheckpointError(msg)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        if not 1 <= getattr(config, name) <= MAX_WIDTH:
            msg = f"{path}: {name} must be from 1 to {MAX_WIDTH}, but is {getattr(config, name)!r}"
            raise InvalidCheckpointError(msg)
    if not 0 <= eoi_token_id < MAX_TOKEN_ID:
        msg = f"{path}: eoi_token_index must be from 0 to {MAX_TOKEN_ID - 1}, but is {eoi_token_id!r}"
        raise InvalidCheckpointError(msg)
    if not 0 < config.query_pre_attn_scalar < math.inf:
        msg = f"{path}: query_pre_attn_scalar must be positive, but is {config.query_pre_attn_scalar!r}"
        raise InvalidCheckpointError(msg)
    if "sliding_attention" in config.layer_types and not (config.sliding_window or 0) > 0:
        msg = f"{path}: sliding_window must be positive where layers slide, but is {config.sliding_window!r}"
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


def identity_facts(config: Any, stack: StackConfig) -> dict[str, Any]:
    """Return what a side's configuration adds to a checkpoint's identity: all that changes its states.

    The names are ours and the numbers are text, so that a release of transformers that adds defaults to its configurations, or
    reads a number as another type, changes nothing here.

    Args:
        config: what transformers makes of that side's part of config.json.
        stack: what `stack_config` made of it.
    """
    facts = {name: value for name, value in vars(stack).items() if name not in ("ropes", "logit_softcap")}
    for kind in sorted(stack.ropes):
        parameters = config.rope_parameters[kind]
        names = STATIC_ROPES[parameters["rope_type"]]
        numbers = {name: parameters[name] for name in names if parameters.get(name) is not None}
        facts[kind] = {"rope_type": parameters["rope_type"], **{name: _text(number) for name, number in numbers.items()}}
    return {name: _text(value) if isinstance(value, float) else value for name, value in facts.items()}


def _text(number: float) -> str:
    return f"{number:.9g}"


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
