"""Layers of a real shape with random weights, without a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from tools.checkpoints import TINY_TEXT
from tools.real_shape import SHAPES
from transformers import T5Gemma2DecoderConfig

from kalm_integrations.core.checkpoint.t5gemma2 import stack_config, stack_weights, weight_shapes
from kalm_integrations.core.model.layers import EmbeddingWeights, LayerWeights, StackConfig, StackWeights
from kalm_integrations.core.model.packing import can_pack, pack

SHAPE_TEXTS = {"nano": SHAPES["nano"], "toy": TINY_TEXT}
VOCABULARY = 2048
"""Rows of the embeddings: looking one up costs nothing, however many there are."""


def make_config(shape: str) -> StackConfig:
    """Return the configuration of the decoder; the encoder's is the same."""
    text = T5Gemma2DecoderConfig(**{**SHAPE_TEXTS[shape], "vocab_size": VOCABULARY})
    return stack_config(text, VOCABULARY, Path())


def draw_stack(config: StackConfig, dtype: torch.dtype, draw: torch.Generator) -> StackWeights:
    """Return random layers, not packed."""
    shapes = weight_shapes(config)

    def draw_weight(name: str) -> torch.Tensor:
        size = shapes.get(name.split(".", 2)[-1], (config.hidden_width,))
        return torch.randn(size, generator=draw) * (size[-1] ** -0.5 if len(size) == 2 else 0.1)

    return stack_weights(draw_weight, config, lambda weight: weight.to(dtype))


def draw_embedding(config: StackConfig, draw: torch.Generator) -> EmbeddingWeights:
    """Return random embeddings."""
    width = config.hidden_width
    return EmbeddingWeights(torch.randn(VOCABULARY, width, generator=draw) * width**-0.5, torch.zeros(width))


def pack_stack(weights: StackWeights) -> StackWeights:
    """Return the same layers with packed matrices, where they can be packed."""
    if not can_pack(weights.dtype, weights.final_norm.device):
        return weights
    layers = [{name: pack(w) if w.ndim == 2 else w for name, w in vars(layer).items()} for layer in weights.layers]
    return StackWeights(tuple(LayerWeights(**layer) for layer in layers), weights.final_norm)
