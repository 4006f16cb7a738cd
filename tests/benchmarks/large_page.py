"""What was measured of large stores, as tables of a page: reads of encodings, and backfill."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tools.paths import DOCS

from benchmarks import trials
from benchmarks.tables import between_marks, significant, table

READS = trials.FOLDER / "large_reads.json"
BACKFILL = trials.FOLDER / "large_backfill.json"
PAGE = DOCS / "scale.md"
NOT_MEASURED = "Not measured."
Measured = dict[str, Any]


def render(reads: Path = READS, backfill: Path = BACKFILL, page: Path = PAGE) -> None:
    """Write the tables of both programs between their marks on a page."""
    text = page.read_text(encoding="utf-8")
    page.write_text(updated_page(_load(reads), _load(backfill), text), encoding="utf-8")


def updated_page(reads: Measured | None, backfill: Measured | None, text: str) -> str:
    """Return a page with the tables between its marks."""
    parts = {
        "large reads": reads and "\n\n".join((_about(reads), _reads(reads), _processes(reads), _sizes(reads))),
        "large backfill": backfill and "\n\n".join((_about(backfill), _backfill(backfill), _grown(backfill))),
    }
    for name, made in parts.items():
        text = between_marks(text, name, made or NOT_MEASURED)
    return text


def summary(row: Measured) -> str:
    """Return what a row of reads says, in one line, while it is measured."""
    return f"{_median_ms(_whole(row))} ms, of which {_median_ms(row['fetch'])} for documents; CPU {_median_ms(row['cpu'])} ms"


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share of the values lies."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def _load(path: Path) -> Measured | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _about(measured: Measured) -> str:
    facts = measured["machine"]
    return f"{facts['cpu']}, {facts['cores']} cores, load before {facts['load_before']:.1f}."


def _whole(row: Measured) -> list[float]:
    return [fetch + read for fetch, read in zip(row["fetch"], row["read"], strict=True)]


def _median_ms(seconds: Sequence[float]) -> str:
    return significant(1000 * statistics.median(seconds))


def _p95_ms(seconds: Sequence[float]) -> str:
    return significant(1000 * percentile(seconds, 0.95))


def _reads(measured: Measured) -> str:
    head = ("documents in", "encodings", "k", "warm, ms", "p95", "of which documents", "CPU ms", "cold, ms", "p95")
    return table(head, [cells for store in measured["stores"].values() for cells in _read_cells(store)])


def _read_cells(store: Measured) -> Iterator[Sequence[object]]:
    rows = {(row["way"], row["k"], row["state"]): row for row in store["rows"]}
    is_bare = store["store"] == store["payloads"] == "LMDB"
    for way, k, _ in (key for key in rows if key[2] == "warm"):
        warm, cold = rows[way, k, "warm"], rows.get((way, k, "cold"))
        of_cold = ("–", "–") if cold is None else (_median_ms(_whole(cold)), _p95_ms(_whole(cold)))
        where = "metadata" if way == "inline" else f"{store['payloads']}, {way}"
        count = "" if warm["count"] == 100_000 else f" ({warm['count']:,})"
        of_documents = "–" if is_bare else _median_ms(warm["fetch"])
        name = "(at hand)" if is_bare else store["store"] + count
        yield name, where, k, _median_ms(_whole(warm)), _p95_ms(_whole(warm)), of_documents, _median_ms(warm["cpu"]), *of_cold


def _processes(measured: Measured) -> str:
    runs = measured["stores"].get("lmdb", {}).get("processes", [])
    rows = []
    for run in runs:
        queries = [seconds for process in run["latencies"] for seconds in process]
        rate = run["k"] * len(queries) / run["seconds"]
        of_cpu = run["k"] * len(queries) / sum(run["cpu"])
        rows.append((run["processes"], significant(rate), significant(of_cpu), _median_ms(queries), _p95_ms(queries)))
    head = ("processes on one LMDB folder", "encodings a second", "encodings a CPU second", "ms a query of 100", "p95")
    return table(head, rows)


def _sizes(measured: Measured) -> str:
    rows = []
    for store in measured["stores"].values():
        for fill in store["fills"]:
            places = ((place, fill[place]) for place in ("disk", "memory") if place in fill)
            sizes = ", ".join(
                f"{n_bytes / 1e9:.2f} GB {'on ' if place == 'disk' else 'in '}{place}" for place, n_bytes in places
            )
            opened = significant(fill["open_seconds"]) if "open_seconds" in fill else "–"
            rows.append((store["store"], fill["way"], f"{fill['documents']:,}", sizes, opened))
    return table(("store", "holds", "documents", "takes", "seconds to open"), rows)


def _backfill(measured: Measured) -> str:
    rows = []
    for store in measured["stores"].values():
        for part in store["parts"]:
            work = ("–", "–", "–")
            if part.get("documents"):
                n = part["documents"]
                work = (f"{n:,}", significant(n / part["seconds"]), significant(1000 * part["cpu_seconds"] / n))
            latencies = part["latencies"]
            name = f"{part['part']}, {store['rate']:.0f} a second" if part["part"] == "held back" else part["part"]
            rows.append((store["store"], name, *work, len(latencies), _median_ms(latencies), _p95_ms(latencies)))
    head = ("store", "backfill", "documents", "a second", "CPU s for 1,000", "queries", "ms a query", "p95")
    return table(head, rows)


def _grown(measured: Measured) -> str:
    rows = []
    for store in measured["stores"].values():
        written = sum(part.get("documents", 0) for part in store["parts"])
        memory = [n_bytes for part in store["parts"] if part["part"] == "as fast as it can" for n_bytes in part["memory"]]
        tenth, last = (memory[len(memory) // 10], memory[-1]) if memory else (0, 0)
        factor = store["grown"] / (written * store["characters"]) if written else 0
        grown = f"{store['grown'] / 1e6:,.0f} MB"
        sizes = (f"{store['before'] / 1e6:,.0f} MB", grown, f"{factor:.2f}")
        rows.append((store["store"], f"{written:,}", *sizes, f"{tenth / 2**20:,.0f} MiB", f"{last / 2**20:,.0f} MiB"))
    head = (
        "store",
        "encodings written",
        "before",
        "growth",
        "bytes a character",
        "memory after a tenth of the time",
        "at the end",
    )
    return table(head, rows)
