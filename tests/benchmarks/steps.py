"""`python -m benchmarks.steps`: what each step of the decoder is worth. All steps on, against each one switched off alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import machine, trials
from benchmarks.parts import timed_parts
from benchmarks.plan import SHORT
from benchmarks.rows import progress, timed
from benchmarks.stacks import SHAPE_TEXTS, VOCABULARY, draw_embedding, draw_stack, make_config, pack_stack
from benchmarks.ways import ALL_ON, DTYPES, POOLED, PREFIX, WAYS, Way
from kalm_integrations.core.model import decoder, kv_cache
from kalm_integrations.core.model.kv_cache import GatheredKVCache, KVCache, PaddedKVCache
from kalm_integrations.core.model.layers import StackWeights
from kalm_integrations.core.model.prefix_states import PrefixStates

WHOLE_VOCABULARY = 262_144
"""Rows of the published checkpoints' output projection."""
N_STATES = 64
"""Of a passage of 256 tokens at ratio 4."""


class Decoder:
    """A random decoder, passages to score by a prompt, and the states of the prompt's prefix for each of them."""

    def __init__(self, shape: str, dtype: torch.dtype, n: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.dtype, self.config = dtype, make_config(shape)
        width = self.config.hidden_width
        self.plain = draw_stack(self.config, dtype, draw)
        self.packed = pack_stack(self.plain)
        self.embedding = draw_embedding(self.config, draw)
        self.head = (torch.randn(2, width, generator=draw) * width**-0.5).to(dtype)
        self.token_ids = torch.randint(VOCABULARY, (1, SHORT.n_tokens), generator=draw)
        self.states = torch.randn(n, N_STATES, width, generator=draw)
        self.prefixes: list[PrefixStates] = []
        for states in self.states.split(Way.batch_size):
            cache = self._project(states, self.packed)
            prefix = self.token_ids[:, : SHORT.n_prefix]
            self.prefixes += decoder.prefill(cache, prefix, self.embedding, self.packed, self.config).split(dtype)

    @cached_property
    def whole_head(self) -> torch.Tensor:
        return self.head.repeat(WHOLE_VOCABULARY // 2, 1)

    def margins(self, mode: str, way: Way, n: int) -> list[float]:
        """Score the first `n` candidates."""
        weights = self.packed if way.is_packed else self.plain
        head = self.head if way.has_short_head else self.whole_head
        margins: list[float] = []
        with ExitStack() as stack:
            if way.replaced is not None:
                stack.enter_context(patch.object(*way.replaced))
            for start in range(0, n, way.batch_size):
                rows = slice(start, min(start + way.batch_size, n))
                cache: KVCache
                if mode == POOLED or not way.are_passages_kept:
                    cache = self._project(self.states[rows], weights)
                if mode == PREFIX:
                    with patch.object(kv_cache, "gathers_at_once", lambda _: not way.is_gathered_by_layer):
                        cache = GatheredKVCache(self.prefixes[rows], SHORT.n_prefix, self.dtype, SHORT.n_new)
                token_ids = self.token_ids[:, cache.n_prompt :]
                if not way.is_prompt_shared:
                    token_ids = token_ids.expand(rows.stop - rows.start, -1)
                last = torch.tensor([token_ids.shape[1] - 1])
                logits = decoder.answer_logits(cache, token_ids, last, self.embedding, weights, head, self.config)
                margins += (logits[:, 0] - logits[:, 1]).tolist()
        return margins

    def _project(self, states: torch.Tensor, weights: StackWeights) -> PaddedKVCache:
        return decoder.project_passages(states, torch.full((len(states),), N_STATES), weights, self.config)


@torch.inference_mode()
def measure(made: Decoder, dtype: str, n: int, rounds: int) -> list[dict[str, Any]]:
    """Return wall and CPU seconds of each round for every way, mode by mode, and the largest difference of a margin.

    Directly before each the same is scored with all steps on (`base_cpu`): a shared machine changes its speed within a round.
    """
    cases = [(mode, name, way) for name, way in WAYS.items() for mode in way.modes if dtype in way.dtypes]
    seconds: dict[tuple[str, str], list[tuple[float, float, float]]] = {(mode, name): [] for mode, name, _ in cases}
    margins: dict[tuple[str, str], Sequence[float]] = {}
    for mode, _, way in cases:
        made.margins(mode, way, 2)
    for _ in range(rounds):
        for mode, name, way in cases:
            _, base, _ = timed(partial(made.margins, mode, Way(), n), "cpu")
            wall, cpu, margins[mode, name] = timed(partial(made.margins, mode, way, n), "cpu")
            seconds[mode, name].append((wall, cpu, base))
            progress(f"{dtype} {mode}, {name}: {wall:.2f} s")
    return [
        {
            "dtype": dtype,
            "mode": mode,
            "way": name,
            "wall": [wall for wall, _, _ in seconds[mode, name]],
            "cpu": [cpu for _, cpu, _ in seconds[mode, name]],
            "base_cpu": [base for _, _, base in seconds[mode, name]],
            "max_difference": max(abs(a - b) for a, b in zip(margins[mode, name], margins[mode, ALL_ON], strict=True)),
        }
        for mode, name, _ in cases
    ]


@torch.inference_mode()
def measure_parts(made: Decoder, dtype: str, n: int, rounds: int) -> list[dict[str, Any]]:
    """Return the wall seconds of each part of a pass, with all steps on, in each round."""
    passes = {mode: partial(made.margins, mode, Way(), n) for mode in (POOLED, PREFIX)}
    return [
        {"dtype": dtype, "mode": mode, "rounds": [timed_parts(run) for _ in range(rounds)]} for mode, run in passes.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = trials.parser("steps", __doc__)
    parser.add_argument("--shape", choices=SHAPE_TEXTS, default="nano")
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    options = trials.parse(parser, arguments)
    facts = machine.describe("cpu")
    rows, parts = [], []
    for dtype in options.dtypes:
        made = Decoder(options.shape, getattr(torch, dtype), options.candidates)
        rows += measure(made, dtype, options.candidates, options.rounds)
        parts += measure_parts(made, dtype, options.candidates, options.rounds)
    about = {"machine": facts, "shape": options.shape, "candidates": options.candidates, "states": N_STATES}
    trials.write(options.output, {**about, "rows": rows, "parts": parts})


if __name__ == "__main__":
    main()
