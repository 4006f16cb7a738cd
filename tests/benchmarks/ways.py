"""The decoder with one of its steps switched off: what `steps.py` measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from kalm_integrations.core.model import decoder, packing
from kalm_integrations.core.model.layers import ACTIVATIONS
from kalm_integrations.core.passes import BATCH_SIZES

POOLED, PREFIX = "pooled", "prefix"
DTYPES = ("float32", "bfloat16")

run_layers, attend = decoder.run_layers, decoder.attend


def _gate_apart(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    return ACTIVATIONS[activation](packing.multiply(x, gate)) * packing.multiply(x, up)


def _run_whole(cache: Any, token_ids: torch.Tensor, last: torch.Tensor, *weights: Any) -> torch.Tensor:
    # Without an index of the last token no layer is cut short. Nothing is padded here: the last token is the last position.
    return run_layers(cache, token_ids, None, *weights)[:, -1]


def _attend_repeated(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *options: Any) -> torch.Tensor:
    group = queries.shape[2] // keys.shape[1]
    return attend(queries, keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1), *options)


def _attend_fused(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attend as `layers.attend` does in float32."""
    rows = queries.unflatten(2, (keys.shape[1], -1)).permute(0, 2, 3, 1, 4)
    if mask is not None:
        mask = mask.repeat(1, rows.shape[2], 1)[:, None]
    attended = F.scaled_dot_product_attention(rows.flatten(2, 3), keys, values, attn_mask=mask, scale=scale)
    return attended.view(rows.shape).permute(0, 3, 1, 2, 4).flatten(2)


@dataclass(frozen=True)
class Way:
    """How the decoder works; each default is what the package does."""

    batch_size: int = BATCH_SIZES["score"]["cpu"]
    is_packed: bool = True
    is_prompt_shared: bool = True
    are_passages_kept: bool = True
    is_gathered_by_layer: bool = True
    has_short_head: bool = True
    replaced: tuple[object, str, Callable[..., torch.Tensor]] | None = None
    """A function of a module, and what stands in for it."""
    modes: tuple[str, ...] = (POOLED, PREFIX)
    dtypes: tuple[str, ...] = DTYPES


ALL_ON = "all steps on"
WAYS = {
    ALL_ON: Way(),
    "plain matrices: not packed, gate not fused": Way(is_packed=False),
    "gate's activation after its product": Way(replaced=(packing, "multiply_gated", _gate_apart)),
    "layer 0 of the prompt for every candidate": Way(is_prompt_shared=False),
    "last layer for all positions": Way(replaced=(decoder, "run_layers", _run_whole)),
    "keys and values repeated for grouped heads": Way(replaced=(decoder, "attend", _attend_repeated)),
    "attention by PyTorch's fused operator": Way(replaced=(decoder, "attend", _attend_fused), dtypes=("bfloat16",)),
    "the whole vocabulary at the last position": Way(has_short_head=False),
    "passages' keys and values made anew": Way(are_passages_kept=False, modes=(PREFIX,)),
    "prefix states of all layers put together at once": Way(is_gathered_by_layer=False, modes=(PREFIX,)),
    "batches of 16": Way(batch_size=16),
    "batches of 64": Way(batch_size=64),
}
"""Each with one step off: what is done instead of it."""
