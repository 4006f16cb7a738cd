"""`python -m benchmarks.int8 FOLDER`: what int8 products in the decoder would cost in accuracy and bring in speed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import floor, machine, trials
from benchmarks.rows import progress, timed
from benchmarks.stacks import SHAPE_TEXTS, make_config
from kalm_integrations import EncodedPassage, KalmReranker
from kalm_integrations.core.model import layers, packing
from kalm_integrations.core.runtime import Runtime
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.evaluation.candidates import Candidates, encode_candidates, find_candidates, score_candidates
from kalm_integrations.evaluation.metrics import kendall_tau

WANTED_TAU = 0.99
ENGINE = "onednn"
ROWS = (192, 384)
"""16 and 32 candidates of 12 tokens."""


def quantize(matrix: torch.Tensor) -> Any:
    """Return a matrix in int8 with a scale for each output, laid out for `multiply_int8`."""
    scales = (matrix.abs().amax(dim=1) / 127).double()
    zeros = torch.zeros(len(matrix), dtype=torch.int64)
    with warnings.catch_warnings():
        # PyTorch deprecates these operators.
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_channel(matrix, scales, zeros, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(quantized, None)


def multiply_int8(x: torch.Tensor, matrix: Any) -> torch.Tensor:
    """Multiply by a quantized matrix; `x` gets one scale, found while it runs."""
    return torch.ops.quantized.linear_dynamic(x, matrix, False)


class Scorer:
    """A reranker in one precision that decodes whole prompts."""

    def __init__(self, model: str, name: str) -> None:
        dtype = "float32" if name == "int8" else name
        self.name = name
        self.reranker = KalmReranker.from_pretrained(model, dtype=dtype, prefix_cache_bytes=0)
        self._replaced: dict[str, Any] = {}
        if name == "int8":
            with patch.object(packing, "can_pack", lambda *_: False):
                runtime = self.reranker._runtime = Runtime(
                    self.reranker.runtime.checkpoint, torch.device("cpu"), torch.float32
                )
                stack = runtime.stack("decoder")
            matrices = [weight for layer in stack.layers for weight in vars(layer).values() if weight.ndim == 2]
            quantized = {id(matrix): quantize(matrix) for matrix in matrices}
            self._replaced = {"linear": lambda x, matrix: multiply_int8(x, quantized[id(matrix)])}

    def margins(self, found: dict[str, Candidates], encodings: dict[str, EncodedPassage]) -> dict[str, list[float]]:
        """Score all candidates by query id."""
        with ExitStack() as stack:
            if self._replaced:
                stack.enter_context(patch.multiple(layers, **self._replaced))
            return score_candidates(self.reranker, found, encodings)


def measure_agreement(model: str, collection: Collection, n_queries: int, top_k: int, rounds: int) -> list[dict[str, Any]]:
    """Return CPU seconds of each precision, round by round, and how far its scores are from float32's."""
    found = find_candidates(collection, top_k=top_k, n_queries=n_queries)
    scorers = [Scorer(model, name) for name in ("float32", "bfloat16", "int8")]
    encodings = encode_candidates(scorers[0].reranker, collection, found)
    few = dict(list(found.items())[:2])
    margins: dict[str, dict[str, list[float]]] = {}
    seconds: dict[str, list[float]] = {scorer.name: [] for scorer in scorers}
    for scorer in scorers:
        scorer.margins(few, encodings)
    for _ in range(rounds):
        for scorer in scorers:
            _, cpu, margins[scorer.name] = timed(lambda scorer=scorer: scorer.margins(found, encodings), "cpu")
            seconds[scorer.name].append(cpu)
            progress(f"{scorer.name}: {cpu:.2f} CPU s")
    exact = margins["float32"]
    return [
        {
            "name": name,
            "cpu": seconds[name],
            "tau": fmean(kendall_tau(exact[query], row) for query, row in own.items()),
            "max_difference": max(
                abs(_sigmoid(a) - _sigmoid(b)) for query, row in own.items() for a, b in zip(exact[query], row, strict=True)
            ),
        }
        for name, own in margins.items()
    ]


@torch.inference_mode()
def measure_products(shape: str, seconds: float) -> list[dict[str, Any]]:
    """Return multiply-adds per second of the decoder's products at a shape, by precision; each is repeated for `seconds`."""
    measured = []
    for product, (n_in, n_out) in floor.product_shapes(floor.Widths.of(make_config(shape))).items():
        weight = torch.randn(n_out, n_in) * n_in**-0.5
        for rows in ROWS:
            x = torch.randn(rows, n_in)
            half = floor._products(weight.bfloat16())[-1]
            products = {"float32": (x, *floor._products(weight)[-1]), "bfloat16": (x.bfloat16(), *half)}
            products["int8"] = (x, multiply_int8, quantize(weight))
            rates = {name: rows * n_in * n_out / floor._seconds(*parts, seconds) for name, parts in products.items()}
            measured.append({"product": product, "n_in": n_in, "n_out": n_out, "rows": rows, "rates": rates})
    return measured


def _sigmoid(margin: float) -> float:
    return 1 / (1 + math.exp(-margin))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = trials.parser("int8", __doc__)
    parser.add_argument("folder", type=Path, help="BEIR folder")
    parser.add_argument("--model", default="pico")
    parser.add_argument("--queries", type=int, default=150)
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", choices=SHAPE_TEXTS, default="nano", help="of the products")
    parser.add_argument("--rate-seconds", type=float, default=0.2)
    options = trials.parse(parser, arguments)
    torch.backends.quantized.engine = ENGINE
    collection = Collection.read(options.folder)
    measured = {
        "machine": machine.describe("cpu"),
        "model": Path(options.model).name,
        "collection": collection.name,
        "n_queries": min(options.queries, len(collection.queries)),
        "candidates": options.candidates,
        "wanted_tau": WANTED_TAU,
        "rows": measure_agreement(options.model, collection, options.queries, options.candidates, options.rounds),
        "rates": measure_products(options.shape, options.rate_seconds),
    }
    trials.write(options.output, measured)


if __name__ == "__main__":
    main()
