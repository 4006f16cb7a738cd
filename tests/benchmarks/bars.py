"""The bars that the project set itself, and whether a run meets them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import plan
from benchmarks.results import Results


@dataclass(frozen=True)
class Bar:
    """A bound on a value of a run; `value` gives None where the run did not measure it."""

    text: str
    value: Callable[[Results], float | None]
    bound: float
    unit: str = "×"
    is_upper: bool = False

    def verdict(self, results: Results) -> tuple[str, str, str]:
        """Return the bound, the value and "met" or "not met", as they are printed."""
        sign = "<" if self.is_upper else "≥"
        value = self.value(results)
        if value is None:
            return f"{sign} {self.bound:g} {self.unit}".strip(), "–", "not measured"
        is_met = value < self.bound if self.is_upper else value >= self.bound
        return (
            f"{sign} {self.bound:g} {self.unit}".strip(),
            f"{value:.2f} {self.unit}".strip(),
            "met" if is_met else "**not met**",
        )


def _ratio(slow: str, fast: str) -> Callable[[Results], float | None]:
    return lambda results: results.ratio(slow, fast)


def _share(name: str) -> Callable[[Results], float | None]:
    return lambda results: results.floor_share(name)


def _bf16_prefix_seconds(results: Results) -> float | None:
    row = results.find(plan.OURS_PREFIX, "bfloat16")
    return None if row is None else row.seconds


BARS = (
    Bar("prefix, against the reference cold", _ratio(plan.REFERENCE_COLD, plan.OURS_PREFIX), 40),
    Bar("prefix, against the reference given pooled states", _ratio(plan.REFERENCE_POOLED, plan.OURS_PREFIX), 20),
    Bar("pooled, against the reference given pooled states", _ratio(plan.REFERENCE_POOLED, plan.OURS_POOLED), 4.5),
    Bar("cold, against the reference cold", _ratio(plan.REFERENCE_COLD, plan.OURS_COLD), 1.8),
    Bar("pooled, share of the floor", _share(plan.OURS_POOLED), 0.85, unit=""),
    Bar("prefix, share of the floor", _share(plan.OURS_PREFIX), 0.8, unit=""),
    Bar("prefix, against the MiniLM-L6 shape", _ratio(plan.MINILM, plan.OURS_PREFIX), 3),
    Bar("prefix in bfloat16, 100 candidates", _bf16_prefix_seconds, 1, unit="s", is_upper=True),
)
