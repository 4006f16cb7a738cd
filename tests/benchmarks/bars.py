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
        bound = f"{'<' if self.is_upper else '≥'} {self.bound:g} {self.unit}".strip()
        value = self.value(results)
        if value is None:
            return bound, "–", "not measured"
        is_met = value < self.bound if self.is_upper else value >= self.bound
        return bound, f"{value:.2f} {self.unit}".strip(), "met" if is_met else "**not met**"


def _ratio(slow: str, fast: str) -> Callable[[Results], float | None]:
    return lambda results: results.ratio(slow, fast)


def _share(name: str) -> Callable[[Results], float | None]:
    def value(results: Results) -> float | None:
        row = results.find(name)
        return None if row is None else results.floor_share(row)

    return value


def _seconds(name: str, dtype: str) -> Callable[[Results], float | None]:
    def value(results: Results) -> float | None:
        row = results.find(name, dtype)
        return None if row is None else row.seconds

    return value


BARS = (
    Bar("prefix, against the reference cold", _ratio(plan.REFERENCE_COLD, plan.OURS_PREFIX), 40),
    Bar("prefix, against the reference given pooled states", _ratio(plan.REFERENCE_POOLED, plan.OURS_PREFIX), 20),
    Bar("pooled, against the reference given pooled states", _ratio(plan.REFERENCE_POOLED, plan.OURS_POOLED), 4.5),
    Bar("cold, against the reference cold", _ratio(plan.REFERENCE_COLD, plan.OURS_COLD), 1.8),
    Bar("pooled, share of the floor", _share(plan.OURS_POOLED), 0.85, unit=""),
    Bar("prefix, share of the floor", _share(plan.OURS_PREFIX), 0.8, unit=""),
    Bar("prefix, against the MiniLM-L6 shape", _ratio(plan.MINILM, plan.OURS_PREFIX), 3),
    Bar("prefix in int8 ÷ prefix in float16", _ratio(plan.OURS_INT8, plan.OURS_HALF), 1.15, is_upper=True),
    Bar("prefix in bfloat16, 100 candidates", _seconds(plan.OURS_PREFIX, "bfloat16"), 1, unit="s", is_upper=True),
)
