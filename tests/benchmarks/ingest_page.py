"""The section of the page on ingest."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.tables import significant, table
from kalm_integrations.planning.arithmetic import encoder_multiply_adds
from kalm_integrations.planning.shapes import PUBLISHED

PER_CORE = "256"
"""The row whose rate the other checkpoints are computed from."""


def ingest_section(measured: dict[str, Any]) -> str:
    """Return the table of a run: seconds, rates and shares of the floor."""
    about = measured["machine"]
    head = ("dtype", "tokens", "passages", "wall s", "CPU s", "passages/s", "tokens/s", "floor s", "share", "best")
    body = []
    for row in measured["rows"]:
        wall = median(row["wall"])
        rates = (significant(row["passages"] / wall), f"{row['total_tokens'] / wall:,.0f}")
        shares = (f"{row['floor'] / wall:.2f}", f"{row['floor'] / min(row['wall']):.2f}")
        seconds = (significant(wall), significant(median(row["cpu"])))
        body.append((row["dtype"], row["tokens"], row["passages"], *seconds, *rates, significant(row["floor"]), *shares))
    where = about["gpu"] or f"{about['cpu']}, {about['threads']} threads"
    made = f"{where}, shape of {measured['shape']}, {measured['rounds']} rounds, load before {about['load_before']}:"
    return f"{made}\n\n{table(head, body)}"


def by_checkpoint(measured: dict[str, Any]) -> str:
    """Return the table of passages an hour and core for each checkpoint."""
    rows = {row["dtype"]: row for row in measured["rows"] if row["tokens"] == PER_CORE}
    threads = measured["machine"]["threads"]
    rates = {dtype: sum(row["multiply_adds"].values()) / median(row["wall"]) / threads for dtype, row in rows.items()}
    body = [
        (name, *(f"{3600 * rate / sum(encoder_multiply_adds(widths, 1, 256).values()):,.0f}" for rate in rates.values()))
        for name, (widths, _) in PUBLISHED.items()
    ]
    title = f"By checkpoint, passages of 256 tokens an hour and core, at the rate that {measured['shape']} reached:"
    return f"{title}\n\n{table(('checkpoint', *rates), body)}"
