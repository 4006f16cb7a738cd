"""The tables of docs/compression.md on states of a real language model, from real_states.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools.evaluation_pages import filled
from tools.paths import DOCS

from benchmarks.tables import table

PAGE = DOCS / "compression.md"
COMMAND = "benchmarks.real_states --render"

BOTH_WAYS, CAUSAL, PICO = "Gemma, both ways", "Gemma, causal", "pico"
"""Gemma's layers as the encoder, whose tokens see each other both ways; as they were trained; and for comparison pico's."""


def updated(page: Path, results: Path) -> str:
    """Return the page with its tables as the results make them."""
    measured = json.loads(results.read_text(encoding="utf-8"))
    return filled(page, COMMAND, {"channels": lambda: channels(measured), "real_states": lambda: codecs(measured)})


def channels(measured: dict[str, Any]) -> str:
    """Return how large states are and how uneven their channels."""
    head = (
        "states",
        "ratio",
        "norm",
        "norm of the mean",
        "deviation of a channel, median",
        "largest",
        "largest ÷ median",
        "largest value",
    )
    rows = []
    for states in measured["states"]:
        for row in states["ratios"]:
            facts = row["channels"]
            largest = [deviation for _, deviation in facts["largest"]]
            rows.append(
                (
                    states["name"],
                    row["ratio"],
                    *(f"{facts[name]:.1f}" for name in ("norm", "mean_norm")),
                    f"{facts['median']:.2f}",
                    ", ".join(f"{deviation:.1f}" for deviation in largest[:3]),
                    f"{largest[0] / facts['median']:.1f}",
                    f"{facts['value']:.0f}",
                )
            )
    return table(head, rows)


def codecs(measured: dict[str, Any]) -> str:
    """Return what each codec loses, on all states at the same ratio side by side."""
    by_name = {states["name"]: states["ratios"] for states in measured["states"]}
    head = (
        "ratio",
        "codec",
        "bytes a state",
        "characters a passage",
        *(f"{what}, {name}" for name in (BOTH_WAYS, CAUSAL) for what in ("error", "cosine")),
        f"error, {PICO}",
    )
    rows = []
    for at_ratio in zip(*(by_name[name] for name in (BOTH_WAYS, CAUSAL, PICO)), strict=True):
        for both_ways, causal, pico in zip(*(row["codecs"] for row in at_ratio), strict=True):
            rows.append(
                (
                    at_ratio[0]["ratio"],
                    f"`{both_ways['codec']}`",
                    f"{both_ways['bytes_a_state']:,.0f}",
                    f"{both_ways['characters']:,.0f}",
                    *(text for codec in (both_ways, causal) for text in (_error(codec), f"{codec['cosine']:.4f}")),
                    _error(pico),
                )
            )
    return table(head, rows)


def _error(codec: dict[str, Any]) -> str:
    error = codec["error"]
    if error == 0:
        return "0"
    return f"{error:#.2g}" if error >= 1e-4 else f"{error:.0e}"
