"""`python -m benchmarks.spans_page`: what was measured of spans, and of batches on a GPU, as tables of their pages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

from tools.paths import DOCS

from benchmarks.span_cost import POOLED, PREFIX, SPANS
from benchmarks.spans import KEPT
from benchmarks.tables import between_marks, significant, table
from benchmarks.trials import FOLDER

SPAN_COSTS = ("span_cost",)
BATCHES = ("batches_nano", "batches_small")


def quality(folder: Path) -> str:
    """Return the table of methods by collection."""
    rows = json.loads((folder / "spans.json").read_text())["rows"]
    head = ["method", *(f"{row['name']}: {what}" for row in rows for what in ("best sentence", "text removed"))]
    body = []
    for method in rows[0]["methods"]:
        found = [row["methods"][method] for row in rows]
        cells = [cell for one in found for cell in (f"{one['hit']:.3f}", f"{100 * one['removed']:.0f} %")]
        body.append([method, *cells])
    counts = "; ".join(f"{row['name']}: {row['questions']:,} questions, {row['sentences']:.1f} sentences" for row in rows)
    return (
        f"{counts} a passage. Text removed: where {100 * KEPT:.0f} % of the questions keep an answer.\n\n{table(head, body)}"
    )


def costs(folder: Path) -> str:
    """Return the table of what the sentences of a query's passages cost."""
    body = []
    for measured in (json.loads((folder / f"{name}.json").read_text()) for name in SPAN_COSTS):
        facts = measured["machine"]
        place = facts["gpu"] or f"{facts['cpu']}, {facts['threads']} threads"
        for row in measured["rows"]:
            seconds = [1000 * median(row["wall"][way]) for way in (POOLED, PREFIX, SPANS)]
            named = (measured["shape"].capitalize(), place, row["dtype"], f"{measured['passages']}, {row['sentences']}")
            body.append((*named, *map(significant, seconds)))
    head = ("shape", "on", "dtype", "passages, sentences", f"{POOLED}: ms", f"{PREFIX}: ms", f"{SPANS}: ms")
    return table(head, body)


def batches(folder: Path) -> str:
    """Return the table of batch sizes."""
    parts = []
    for measured in (json.loads((folder / f"{name}.json").read_text()) for name in BATCHES):
        facts, n = measured["machine"], measured["passages"]
        body = [
            (
                row["dtype"],
                row["size"],
                significant(n / median(row["encode"])),
                _gigabytes(row["encode_peak"] - row["loaded"]),
                significant(1000 * median(row["score"])),
                _gigabytes(row["score_peak"] - row["loaded"]),
            )
            for row in measured["rows"]
        ]
        head = ("dtype", "batch", "passages/s", "encoder: GB", f"{n:,} candidates: ms", "decoder: GB")
        about = f"{measured['shape'].capitalize()}'s shape, {facts['gpu']}, {n:,} passages of {measured['tokens']} tokens"
        parts.append(f"{about}; memory is what a batch takes beside the weights:\n\n{table(head, body)}")
    return "\n\n".join(parts)


def _gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f}"


PAGES: dict[Path, dict[str, Callable[[Path], str]]] = {
    DOCS / "spans.md": {"span quality": quality, "span costs": costs},
    DOCS / "gpu.md": {"batches": batches},
}


def updated(page: Path, folder: Path = FOLDER) -> str:
    """Return a page with its tables as they were measured."""
    text = page.read_text(encoding="utf-8")
    for name, make in PAGES[page].items():
        text = between_marks(text, name, make(folder))
    return text


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(updated(path), encoding="utf-8")
