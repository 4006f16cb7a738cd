"""The shape of a checkpoint, without its weights."""

from __future__ import annotations

import os
from dataclasses import dataclass

from kalm_integrations.core.checkpoint.locate import (
    ALIASES,
    BUILT_IN_ALIASES,
    did_you_mean_model,
    published_max_ratio,
    resolve,
)
from kalm_integrations.core.checkpoint.opened import Checkpoint
from kalm_integrations.core.checkpoint.tokenization import PromptTokenizer
from kalm_integrations.core.settings import INSTRUCTION, SYSTEM_INSTRUCTION
from kalm_integrations.errors import SettingsError
from kalm_integrations.planning.arithmetic import Widths

DEFAULT_MAX_RATIO = 32
"""The coarsest ratio of a checkpoint that says nothing of it."""

N_PREFIX = 53
"""Tokens of the prompt before the query: the published checkpoints' tokenizer, the default instruction."""


@dataclass(frozen=True)
class Shape:
    """What sizes and seconds depend on."""

    encoder: Widths
    decoder: Widths
    n_kv_heads: int
    """Of the decoder."""
    n_prefix: int
    """Tokens of the prompt before the query, under the default instruction."""
    max_ratio: int
    """The coarsest ratio that the checkpoint was trained for."""
    max_passage_tokens: int | None = None
    """Its own limit, if it has one."""


_HEAD_WIDTH = 256
_LAYERS_PER_FULL = 6
"""Every sixth layer sees everything, the others a window."""


def _published(n_layers: int, hidden: int, mlp: int, heads: tuple[int, int], window: int) -> tuple[Widths, int]:
    """Return widths, and the number of heads that have keys; `heads` are those of queries and of keys."""
    kinds = ("full_attention" if (i + 1) % _LAYERS_PER_FULL == 0 else "sliding_attention" for i in range(n_layers))
    n_heads, n_kv_heads = heads
    return Widths(tuple(kinds), window, hidden, n_heads * _HEAD_WIDTH, n_kv_heads * _HEAD_WIDTH, mlp), n_kv_heads


PUBLISHED = {
    "nano": _published(18, 640, 2048, (4, 1), 512),
    "small": _published(26, 1152, 6912, (4, 1), 512),
    "large": _published(34, 2560, 10_240, (8, 4), 1024),
}
"""By alias; the second generation has the shapes of the first."""


def shape_of(model: str) -> Shape:
    """Return the shape of a checkpoint: an alias or its hub id, which is not fetched, or a local folder.

    Raises:
        InvalidCheckpointError: the folder holds no checkpoint.
        SettingsError: it is neither.
    """
    names = {alias: alias for alias in ALIASES} | {published.hub_id: alias for alias, published in ALIASES.items()}
    if model in names:
        widths, n_kv_heads = PUBLISHED[names[model].removesuffix("-r2")]
        return Shape(widths, widths, n_kv_heads, N_PREFIX, published_max_ratio(model) or DEFAULT_MAX_RATIO)
    if model not in BUILT_IN_ALIASES and not os.path.isdir(model):  # noqa: PTH112 - pathlib raises for some names
        known = ", ".join((*BUILT_IN_ALIASES, *ALIASES))
        msg = (
            f"a model to plan for must be one of {known}, or a local folder, but got {model!r}; plans fetch nothing"
            f"{did_you_mean_model(model)}"
        )
        raise SettingsError(msg)
    checkpoint = Checkpoint.open(resolve(model))
    prefix = PromptTokenizer(checkpoint.load_tokenizer()).prompt_prefix(SYSTEM_INSTRUCTION, INSTRUCTION)
    return Shape(
        Widths.of(checkpoint.encoder_config),
        Widths.of(checkpoint.decoder_config),
        checkpoint.decoder_config.n_kv_heads,
        len(prefix),
        checkpoint.defaults.max_compression_ratio or DEFAULT_MAX_RATIO,
        checkpoint.defaults.max_passage_tokens,
    )
