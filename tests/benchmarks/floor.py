"""The floor: the work of `kalm_integrations.planning.arithmetic` at the rate of this machine's own matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from kalm_integrations.core.model.packing import can_pack, multiply, pack
from kalm_integrations.planning.arithmetic import Widths, product_shapes
from kalm_integrations.planning.speed import ROWS


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
