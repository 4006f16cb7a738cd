"""The floor: the multiply-adds that an exact score cannot do without, at the rate of this machine's own matrix products.

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

import time
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from kalm_integrations.core.model.layers import StackConfig
from kalm_integrations.core.model.packing import can_pack, multiply, pack

ROWS = (192, 512, 1040, 2048, 4096)
"""Rows of the left matrix to try: 16 candidates of 12 tokens up to a batch of passages. The best rate counts."""

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


def floor_seconds(multiply_adds: dict[str, int], rates: dict[str, float]) -> float:
    """Return seconds at measured multiply-adds per second; attention gets the best rate of all, which it never reaches."""
    best = max(rates.values())
    return sum(count / rates.get(name, best) for name, count in multiply_adds.items())


def measure_rates(widths: Widths, dtype: str, device: str, seconds: float) -> dict[str, float]:
    """Return multiply-adds per second of each product: the best over `ROWS`, and over plain and packed weights.

    Each is repeated for `seconds`.
    """
    rates = {}
    with torch.inference_mode():
        for name, (n_in, n_out) in product_shapes(widths).items():
            weight = torch.randn(n_out, n_in, dtype=getattr(torch, dtype), device=device) * n_in**-0.5
            rates[name] = max(
                rows * n_in * n_out / _seconds(torch.randn(rows, n_in, dtype=weight.dtype, device=device), *product, seconds)
                for rows in ROWS
                for product in _products(weight)
            )
    return rates


Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _products(weight: torch.Tensor) -> list[tuple[Multiply, torch.Tensor]]:
    """Return the ways to multiply by a weight, each with the layout that it takes."""
    packed = [(multiply, pack(weight))] if can_pack(weight.dtype, weight.device) else []
    return [(F.linear, weight), *packed]


def _seconds(x: torch.Tensor, times: Multiply, weight: torch.Tensor, at_least: float) -> float:
    """Return seconds of one product: the mean over `at_least` seconds of them, after some that are not counted."""
    # A GPU is given several at a time, so that it does not wait for Python.
    at_a_time = 1 if x.device.type == "cpu" else 20

    def run() -> None:
        for _ in range(at_a_time):
            times(x, weight)
        if x.device.type != "cpu":
            torch.cuda.synchronize(x.device)

    run()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < at_least:
        run()
        count += at_a_time
    return (time.perf_counter() - started) / count


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
