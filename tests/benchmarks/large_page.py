"""What was measured of large stores, as tables of a page."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks import trials

READS = trials.FOLDER / "large_reads.json"


def milliseconds(row: dict[str, Any]) -> str:
    whole = [1000 * (fetch + read) for fetch, read in zip(row["fetch"], row["read"], strict=True)]
    return f"{statistics.median(whole):.1f} ({1000 * statistics.median(row['fetch']):.1f} fetch), p95 {sorted(whole)[int(.95*len(whole))]:.1f}"

def render(): ...
