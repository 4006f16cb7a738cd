"""Seconds, from what the benchmark reached on its machine and a measurement of this one."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from kalm_integrations.core.model.packing import can_pack, multiply, pack
from kalm_integrations.core.sizes import n_pooled_states
from kalm_integrations.planning.arithmetic import decoder_multiply_adds, encoder_multiply_adds
from kalm_integrations.planning.reading import PassageRead
from kalm_integrations.planning.shapes import Shape

PRODUCT = "gate_up"
"""The product of `arithmetic.product_shapes` whose rate compares machines, at Nano's widths."""
_N_IN, _N_OUT = 640, 4096

ROWS = (192, 512, 1040, 2048, 4096)
"""Rows of the left matrix to try: 16 candidates of 12 tokens up to a batch of passages. The best rate counts."""

N_NEW = 12
"""Tokens of the prompt that come with a query: a question of seven words."""

ENCODE, POOLED, PREFIX = "encode", "pooled", "prefix"
"""Work that has a rate: passages into states; a query over encodings, and over prefix states."""

BENCHMARK_CORES = 2
"""Of the machine that the benchmark ran on."""

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Speed:
    """How fast a machine is at a dtype."""

    scale: float
    """Rate of the product there, in that of the benchmark's machine."""
    rates: dict[str, Points]
    """Multiply-adds per second that the benchmark reached for each work, by tokens of a passage."""
    cores: int = BENCHMARK_CORES
    """That share the work."""

    def encode_seconds(self, shape: Shape, passages: int, read: PassageRead) -> float:
        """Return the seconds of encoding passages."""
        return sum(self._encode_seconds(shape, passages * n_parts, n_tokens) for n_tokens, n_parts in read.sizes.items())

    def passages_per_hour_and_core(self, shape: Shape, read: PassageRead) -> float:
        """Return how many passages a core encodes in an hour."""
        return 3600 / (self.encode_seconds(shape, 1, read) * self.cores)

    def query_seconds(self, shape: Shape, candidates: int, read: PassageRead, ratio: int) -> dict[str, float]:
        """Return the seconds of a query by what is kept of its candidates, all windows of which are scored."""
        total: Counter[str] = Counter()
        for n_tokens, n_parts in read.sizes.items():
            total.update(self._query_seconds(shape, candidates * n_parts, n_tokens, ratio))
        return dict(total)

    def _encode_seconds(self, shape: Shape, passages: int, n_tokens: int) -> float:
        return self._seconds(ENCODE, passages * _sum(encoder_multiply_adds(shape.encoder, 1, n_tokens)), n_tokens)

    def _query_seconds(self, shape: Shape, candidates: int, n_tokens: int, ratio: int) -> dict[str, float]:
        n_states = n_pooled_states(n_tokens, ratio)
        whole = decoder_multiply_adds(shape.decoder, candidates, n_states, 0, shape.n_prefix + N_NEW)
        rest = decoder_multiply_adds(shape.decoder, candidates, n_states, shape.n_prefix, N_NEW)
        pooled = self._seconds(POOLED, _sum(whole), n_tokens)
        return {
            "nothing": self._encode_seconds(shape, candidates, n_tokens) + pooled,
            "encodings": pooled,
            "prefix states": self._seconds(PREFIX, _sum(rest), n_tokens),
        }

    def _seconds(self, work: str, multiply_adds: int, n_tokens: int) -> float:
        at, rates = zip(*self.rates[work], strict=True)
        return multiply_adds / (float(np.interp(n_tokens, at, rates)) * self.scale)


def speed_at(measured: dict[str, Any], dtype: str, scale: float | None) -> Speed:
    """Return the speed of a machine at a dtype.

    Args:
        measured: what the benchmark found by dtype: the rate of the product, and `Speed.rates`.
        dtype: torch's name.
        scale: see `Speed`; None measures this machine's CPU for a second.
    """
    of_dtype = measured[dtype]
    if scale is not None:
        return Speed(scale, of_dtype["rates"])
    scale = product_rate(getattr(torch, dtype), 1.0) / of_dtype["product"]
    return Speed(scale, of_dtype["rates"], torch.get_num_threads())


def product_rate(dtype: torch.dtype, seconds: float) -> float:
    """Return the best multiply-adds per second of a product, as the layers compute it, in so many seconds of trying."""
    with torch.inference_mode():
        weight = torch.randn(_N_OUT, _N_IN, dtype=dtype)
        is_packed = can_pack(dtype, weight.device)
        product, weight = (multiply, pack(weight)) if is_packed else (F.linear, weight)
        inputs = [torch.randn(rows, _N_IN, dtype=dtype) for rows in ROWS]
        best, until = 0.0, time.perf_counter() + seconds
        while best == 0 or time.perf_counter() < until:
            for x in inputs:
                started = time.perf_counter()
                product(x, weight)
                best = max(best, len(x) * _N_IN * _N_OUT / (time.perf_counter() - started))
    return best


def _sum(multiply_adds: dict[str, int]) -> int:
    return sum(multiply_adds.values())
