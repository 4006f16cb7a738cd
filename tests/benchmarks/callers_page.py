"""The page's section on many callers, from callers.json."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.tables import significant, table

SERIAL, LOCK, THREADS, COROUTINES = "one after the other", "plain lock", "threads", "coroutines"

BARS = {("pico", 64, 3): 2.4, ("pico", 64, 5): 1.8}
"""What coroutines were to reach, in queries per second of one after the other."""


def callers_section(measured: dict[str, Any]) -> str:
    """Return the tables of all shapes."""
    facts = measured["machine"]
    parts = [f"{facts['cpu']}, {facts['threads']} threads, load before {facts['load_before']:.2f}."]
    for shape in measured["shapes"]:
        title = f"### {shape['shape'].capitalize()}, passages of {shape['passage_tokens']} tokens, {shape['rounds']} rounds"
        parts += [title, _cells(shape), _bars(shape), _ingest(shape["ingest"])]
    return "\n\n".join(part for part in parts if part)


def _cells(shape: dict[str, Any]) -> str:
    head = (
        "candidates",
        "callers",
        f"{SERIAL}: queries/s",
        f"{LOCK}: ÷",
        f"{THREADS}: ÷",
        f"{COROUTINES}: ÷",
        f"{LOCK}: p50, p99 ms",
        f"{COROUTINES}: p50, p99 ms",
        "p99 ÷ p50",
    )
    return table(
        head,
        [
            (
                cell["candidates"],
                cell["callers"],
                significant(median(row["rate"] for row in cell["ways"][SERIAL])),
                *(f"{ratio(cell, way):.2f}" for way in (LOCK, THREADS, COROUTINES)),
                *(", ".join(_ms(cell, way, at) for at in ("p50", "p99")) for way in (LOCK, COROUTINES)),
                f"{median(row['p99'] / row['p50'] for row in cell['ways'][COROUTINES]):.2f}",
            )
            for cell in shape["cells"]
        ],
    )


def _bars(shape: dict[str, Any]) -> str:
    rows = []
    for cell in shape["cells"]:
        bar = BARS.get((shape["shape"], cell["callers"], cell["candidates"]))
        if bar is not None:
            best = max(ratio(cell, way) for way in (THREADS, COROUTINES))
            verdict = "met" if best >= bar else "**not met**"
            rows.append(
                (f"{cell['callers']} callers × {cell['candidates']} candidates", f"≥ {bar} ×", f"{best:.2f} ×", verdict)
            )
    if shape["shape"] == "nano":
        worst = min(ratio(cell, way) for cell in shape["cells"] for way in (THREADS, COROUTINES))
        rows.append(("never below one after the other", "≥ 1 ×", f"{worst:.2f} ×", "met" if worst >= 1 else "**not met**"))
    ingest = shape["ingest"]
    bound = 3 * _alone(ingest) + ingest["batch"]
    for name, value in (("median", _beside(ingest)), ("slowest", _slowest(ingest))):
        verdict = "met" if value <= bound else "**not met**"
        rows.append((f"stored query beside an ingest, {name}", f"≤ {1000 * bound:.0f} ms", f"{1000 * value:.0f} ms", verdict))
    return table(("", "bar", "measured", ""), rows)


def _ingest(ingest: dict[str, Any]) -> str:
    alone, beside, slowest = (1000 * seconds(ingest) for seconds in (_alone, _beside, _slowest))
    return (
        f"A query over {ingest['candidates']} stored candidates takes {alone:.0f} ms alone. While {ingest['n_ingested']:,} "
        f"passages are being encoded it takes {beside:.0f} ms in the median of {len(ingest['beside'])} queries, "
        f"{slowest:.0f} ms at worst; a batch of the encoder takes {1000 * ingest['batch']:.0f} ms."
    )


def _alone(ingest: dict[str, Any]) -> float:
    return median(ingest["alone"])


def _beside(ingest: dict[str, Any]) -> float:
    return median(ingest["beside"])


def _slowest(ingest: dict[str, Any]) -> float:
    return float(max(ingest["beside"]))


def ratio(cell: dict[str, Any], way: str) -> float:
    """Return queries per second, in those of one after the other: the median over rounds."""
    pairs = zip(cell["ways"][way], cell["ways"][SERIAL], strict=True)
    return median(row["rate"] / serial["rate"] for row, serial in pairs)


def _ms(cell: dict[str, Any], way: str, at: str) -> str:
    return significant(1000 * median(row[at] for row in cell["ways"][way]))
