"""The multiply-adds that an exact score cannot do without.

Widths: H hidden, Q all query heads, K all key (or value) heads, I the MLP. A passage has S pooled states. A prompt has T
tokens to be read, after P whose prefix states are kept; C candidates; L layers. The products of one query:

* what a passage contributes, unless prefix states are kept: L · C · S · H · 2K
* query, key and value: T · H · (Q + 2K) in layer 0, which sees the same prompt for all candidates; C times that in each of the
  L - 2 layers between; C · T · H · 2K + C · H · Q in the last one, of which only the last position is read
* attention: 2Q for each position that a token sees, S + P + 1 to S + P + T of them; the last layer for its last token only
* out, gate and up, down: Q · H, H · 2I and I · H for each token: C · T tokens in L - 1 layers, C in the last one
* the two answers: C · 2H

The encoder does all layers for all n tokens of a passage, with n · (H · (Q + 2K) + Q · H + 3 · H · I) and attention
2Q · n · n (less where a window cuts it).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kalm_integrations.core.model.layers import StackConfig

ATTENTION = "attention"


@dataclass(frozen=True)
class Widths:
    """What the arithmetic needs of a configuration; both sides of a checkpoint have the same."""

    layer_types: tuple[str, ...]
    sliding_window: int | None
    hidden_width: int
    query_width: int
    kv_width: int
    mlp_width: int

    @classmethod
    def of(cls, config: StackConfig) -> Widths:
        """Return the widths of a configuration."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


def product_shapes(widths: Widths) -> dict[str, tuple[int, int]]:
    """Return features in and out of each matrix product of a layer."""
    return {
        "qkv": (widths.hidden_width, widths.query_width + 2 * widths.kv_width),
        "kv": (widths.hidden_width, 2 * widths.kv_width),
        "out": (widths.query_width, widths.hidden_width),
        "gate_up": (widths.hidden_width, 2 * widths.mlp_width),
        "down": (widths.mlp_width, widths.hidden_width),
    }


def decoder_multiply_adds(widths: Widths, candidates: int, n_states: int, n_cached: int, n_new: int) -> dict[str, int]:
    """Return the multiply-adds of one query by product, for the formula above; `n_cached` = 0 reads the passages too."""
    size = {name: n_in * n_out for name, (n_in, n_out) in product_shapes(widths).items()}
    n_layers = len(widths.layer_types)
    token_passes = candidates * (n_new * (n_layers - 1) + 1)
    query_only = widths.hidden_width * widths.query_width
    visible = [[n_states + _within(kind, widths, n_cached + i + 1) for i in range(n_new)] for kind in widths.layer_types]
    n_attended = sum(map(sum, visible[:-1])) + visible[-1][-1]
    return {
        "qkv": size["qkv"] * n_new * (1 + candidates * (n_layers - 2)) + candidates * query_only,
        "kv": size["kv"] * candidates * (n_new + (0 if n_cached else n_layers * n_states)),
        "out": size["out"] * token_passes,
        "gate_up": size["gate_up"] * token_passes,
        "down": size["down"] * token_passes,
        ATTENTION: candidates * 2 * widths.query_width * n_attended,
    }


def encoder_multiply_adds(widths: Widths, candidates: int, n_tokens: int) -> dict[str, int]:
    """Return the multiply-adds of encoding passages by product."""
    size = {name: n_in * n_out for name, (n_in, n_out) in product_shapes(widths).items()}
    per_layer = {name: size[name] * candidates * n_tokens for name in ("qkv", "out", "gate_up", "down")}
    attended = sum(_pairs(kind, widths, n_tokens) for kind in widths.layer_types)
    products = {name: count * len(widths.layer_types) for name, count in per_layer.items()}
    return {**products, ATTENTION: candidates * 2 * widths.query_width * attended}


def _within(kind: str, widths: Widths, n_visible: int) -> int:
    window = widths.sliding_window if kind == "sliding_attention" else None
    return n_visible if window is None else min(n_visible, window)


def _pairs(kind: str, widths: Widths, n_tokens: int) -> int:
    """Return how many (token, seen token) pairs an encoder layer has."""
    window = widths.sliding_window if kind == "sliding_attention" else None
    if window is None:
        return n_tokens**2
    back, ahead = (window + 1) // 2 - 1, window // 2
    return sum(min(i, back) + 1 + min(n_tokens - 1 - i, ahead) for i in range(n_tokens))
