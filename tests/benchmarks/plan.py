"""What is measured, as data. Rows that cost minutes are measured on fewer candidates or rounds, and say so."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

N_CLOSING = 5
"""Tokens of the template after the query."""


@dataclass(frozen=True)
class Prompt:
    """Tokens of a prompt: those that depend on the instruction only, and those that come with the query."""

    n_prefix: int
    n_new: int

    @property
    def n_tokens(self) -> int:
        return self.n_prefix + self.n_new

    @property
    def n_query(self) -> int:
        """Tokens of the query itself; the template closes the prompt."""
        return self.n_new - N_CLOSING


SHORT = Prompt(53, 12)
"""A question of seven words under the default instruction, with the tokenizer of Gemma 3."""
LONG = Prompt(56, 24)


@dataclass(frozen=True)
class RowSpec:
    """One row of the tables."""

    name: str
    dtype: str
    prompt: Prompt
    passage_tokens: int
    candidates: int
    """What the seconds are quoted for."""
    measured: int
    """How many candidates a round scores."""
    rounds: int


@dataclass(frozen=True)
class CurveSpec:
    """Growth of our seconds along one axis, the others held at `base`."""

    axis: str
    """candidates, passage_tokens or n_new."""
    points: tuple[int, ...]
    base: RowSpec

    def at(self, point: int) -> RowSpec:
        if self.axis == "candidates":
            return replace(self.base, candidates=point, measured=point)
        if self.axis == "passage_tokens":
            return replace(self.base, passage_tokens=point)
        return replace(self.base, prompt=Prompt(self.base.prompt.n_prefix, point))


@dataclass(frozen=True)
class Plan:
    """All that one run measures. Rows of one dtype are in memory together and interleaved."""

    rows: tuple[RowSpec, ...]
    curves: tuple[CurveSpec, ...]
    memory: tuple[tuple[str, int], ...]
    """Names of rows and candidates, each in a process of its own."""
    memory_passage_tokens: int
    storage_passages: int
    rate_seconds: float = 0.05
    """How long a matrix product is repeated for its rate."""


REFERENCE_COLD, REFERENCE_POOLED = "reference, cold", "reference, pooled states given"
OURS_COLD, OURS_POOLED = "ours, cold", "ours, pooled"
OURS_FIRST, OURS_PREFIX = "ours, pooled, prefix states made", "ours, prefix"
OURS_HALF, OURS_INT8 = "ours, prefix in float16", "ours, prefix in int8"
OURS_DISK = "ours, prefix from disk"
BGE, QWEN, MINILM = "bge-reranker-v2-m3 shape", "Qwen3-Reranker-0.6B shape", "MiniLM-L6 shape"

BARE_QUERY = (BGE, MINILM)
"""Rows of models that read the query without a prompt around it."""

# dtype, passage tokens -> row -> (candidates measured, rounds)
_CPU: dict[tuple[str, int], dict[str, tuple[int, int]]] = {
    ("float32", 256): {
        REFERENCE_COLD: (100, 2),
        REFERENCE_POOLED: (100, 2),
        OURS_COLD: (100, 2),
        OURS_FIRST: (100, 3),
        OURS_POOLED: (100, 5),
        OURS_PREFIX: (100, 5),
        OURS_HALF: (100, 5),
        OURS_INT8: (100, 5),
        OURS_DISK: (100, 5),
        BGE: (32, 1),
        QWEN: (10, 1),
        MINILM: (100, 5),
    },
    ("float32", 1024): {
        REFERENCE_COLD: (16, 1),
        REFERENCE_POOLED: (32, 1),
        OURS_COLD: (32, 1),
        OURS_FIRST: (100, 2),
        OURS_POOLED: (100, 3),
        OURS_PREFIX: (100, 5),
        BGE: (8, 1),
        QWEN: (4, 1),
        MINILM: (100, 3),
    },
    ("bfloat16", 256): {
        REFERENCE_COLD: (32, 2),
        REFERENCE_POOLED: (32, 2),
        OURS_COLD: (32, 2),
        OURS_FIRST: (100, 3),
        OURS_POOLED: (100, 5),
        OURS_PREFIX: (100, 5),
        BGE: (32, 1),
        QWEN: (10, 1),
        MINILM: (100, 5),
    },
    ("bfloat16", 1024): {
        REFERENCE_COLD: (16, 1),
        REFERENCE_POOLED: (32, 1),
        OURS_COLD: (16, 1),
        OURS_FIRST: (100, 2),
        OURS_POOLED: (100, 3),
        OURS_PREFIX: (100, 5),
        BGE: (8, 1),
        QWEN: (4, 1),
        MINILM: (100, 3),
    },
}


def cpu_plan(dtypes: Iterable[str] = ("float32", "bfloat16")) -> Plan:
    """About half an hour on two cores."""
    dtypes = tuple(dtypes)
    rows = [
        RowSpec(name, dtype, SHORT, length, 100, measured, rounds)
        for (dtype, length), table in _CPU.items()
        for name, (measured, rounds) in table.items()
        if dtype in dtypes
    ]
    rows += [RowSpec(name, dtype, LONG, 256, 100, 100, 3) for dtype in dtypes for name in (OURS_POOLED, OURS_PREFIX)]
    curves = [
        CurveSpec(axis, points, RowSpec(name, dtypes[0], SHORT, 256, n, n, rounds))
        for axis, points, n, (pooled_rounds, prefix_rounds) in (
            ("candidates", (10, 32, 100, 320, 1000), 100, (1, 3)),
            ("passage_tokens", (64, 128, 256, 512, 1024), 32, (3, 5)),
            ("n_new", (12, 24, 48, 96, 192), 32, (2, 3)),
        )
        for name, rounds in ((OURS_POOLED, pooled_rounds), (OURS_PREFIX, prefix_rounds))
    ]
    memory = ((REFERENCE_COLD, 32), (OURS_COLD, 32), (OURS_POOLED, 100), (OURS_PREFIX, 100))
    return Plan(tuple(rows), tuple(curves), memory, 256, 100)


def cuda_plan(dtypes: Iterable[str] = ("bfloat16",)) -> Plan:
    """All rows at 100 candidates, ours at 1,000 too."""
    names = (REFERENCE_COLD, REFERENCE_POOLED, OURS_COLD, OURS_FIRST, OURS_POOLED, OURS_PREFIX, BGE, QWEN, MINILM)
    rows = [
        RowSpec(name, dtype, SHORT, length, n, n, 5)
        for dtype in dtypes
        for length in (256, 1024)
        for n in (100, 1000)
        for name in names
        if n == 100 or name in (OURS_POOLED, OURS_PREFIX)
    ]
    return Plan(tuple(rows), (), (), 256, 0)


def toy_plan(dtypes: Iterable[str] = ("float32", "bfloat16")) -> Plan:
    """Everything once, as small as it gets: proves that the programs run."""
    full = cpu_plan(dtypes)
    lengths = {256: 12, 1024: 24}
    rows = [replace(row, passage_tokens=lengths[row.passage_tokens], candidates=4, measured=4, rounds=1) for row in full.rows]
    curves = [
        replace(
            curve, points=points[curve.axis], base=replace(curve.base, passage_tokens=12, candidates=3, measured=3, rounds=1)
        )
        for curve in full.curves
        for points in [{"candidates": (2, 3), "passage_tokens": (8, 12), "n_new": (12, 13)}]
    ]
    return Plan(tuple(rows), tuple(curves), ((OURS_PREFIX, 2),), 12, 2, rate_seconds=0.001)
