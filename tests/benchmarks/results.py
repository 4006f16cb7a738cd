"""Results of one device and shape, and what follows from them: seconds, ratios, shares of the floor."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from benchmarks import floor, plan
from benchmarks.plan import SHORT, Prompt
from kalm_integrations.planning import arithmetic

RATIO = 4
"""Compression ratio of every row: the default."""


@dataclass(frozen=True)
class Row:
    """One measured row."""

    fields: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.fields[name]

    @property
    def prompt(self) -> Prompt:
        return Prompt(**self.fields["prompt"])

    @property
    def seconds(self) -> float:
        """Median wall seconds, scaled from the candidates measured to those quoted."""
        return statistics.median(self.wall) * self.candidates / self.measured

    @property
    def cpu_seconds(self) -> float:
        return statistics.median(self.cpu) * self.candidates / self.measured


@dataclass(frozen=True)
class Results:
    """What one run measured; whatever it did not is None or empty."""

    run: dict[str, Any]

    @property
    def rows(self) -> list[Row]:
        return [Row(fields) for fields in self.run.get("rows", [])]

    def find(
        self, name: str, dtype: str = "float32", passage_tokens: int = 256, prompt: Prompt = SHORT, candidates: int = 100
    ) -> Row | None:
        wanted = (name, dtype, passage_tokens, prompt, candidates)
        for row in self.rows:
            if (row.name, row.dtype, row.passage_tokens, row.prompt, row.candidates) == wanted:
                return row
        return None

    def ratio(self, slow: str, fast: str, dtype: str = "float32", passage_tokens: int = 256) -> float | None:
        """Return how many times as long `slow` takes."""
        rows = [self.find(name, dtype, passage_tokens) for name in (slow, fast)]
        return None if None in rows else rows[0].seconds / rows[1].seconds

    @property
    def widths(self) -> arithmetic.Widths:
        config = self.run["config"]
        return arithmetic.Widths(**{**config, "layer_types": tuple(config["layer_types"])})

    def rates(self, dtype: str) -> dict[str, float]:
        """Return median multiply-adds per second of each product."""
        rounds = self.run["rates"][dtype]
        return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}

    def multiply_adds(self, row: Row) -> dict[str, int]:
        """Return the least work of one of our rows by product."""
        widths = self.widths
        n_states = math.ceil(row.passage_tokens / RATIO)
        prompt = row.prompt
        whole = arithmetic.decoder_multiply_adds(widths, row.candidates, n_states, 0, prompt.n_tokens)
        if row.name in (plan.OURS_PREFIX, plan.OURS_HALF, plan.OURS_INT8, plan.OURS_DISK):
            return arithmetic.decoder_multiply_adds(widths, row.candidates, n_states, prompt.n_prefix, prompt.n_new)
        if row.name == plan.OURS_COLD:
            encoding = arithmetic.encoder_multiply_adds(widths, row.candidates, row.passage_tokens)
            return {name: whole[name] + encoding.get(name, 0) for name in whole}
        return whole

    def floor_seconds(self, row: Row) -> float:
        return floor.floor_seconds(self.multiply_adds(row), self.rates(row.dtype))

    def floor_share(self, row: Row) -> float:
        """Return the floor's part of the seconds of one of our rows."""
        return self.floor_seconds(row) / row.seconds
