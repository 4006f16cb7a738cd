"""What the programs of single measurements share: their options, and the tables of the page."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import machine
from benchmarks.callers_page import callers_section
from benchmarks.helpers_page import helpers_section
from benchmarks.ingest_page import by_checkpoint, ingest_section
from benchmarks.serving_page import serving_section
from benchmarks.tables import significant, table
from benchmarks.ways import ALL_ON, POOLED, PREFIX

FOLDER = Path(__file__).parents[2] / "docs" / "benchmarks"
NAMES = ("steps", "windows", "helpers", "callers", "serving", "ingest", "ingest_before", "ingest_cuda")
NOT_MEASURED = "Not measured."


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the option that all programs have."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    made.add_argument("--output", type=Path, default=FOLDER / f"{name}.json", help=f"default: docs/benchmarks/{name}.json")
    return made


def parse(made: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; a program that was started by its command line gets the environment of a run."""
    options = made.parse_args(arguments)
    if arguments is None:
        machine.start_again("tuned")
        logging.disable(logging.WARNING)
    return options


def write(path: Path, measured: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(measured, indent=1) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """Return what each program has measured, by its name."""
    paths = {name: folder / f"{name}.json" for name in NAMES}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def sections(measured: dict[str, Any]) -> dict[str, str]:
    """Return the text of each program's place on the page."""
    makers = {
        "steps": _steps,
        "windows": _windows,
        "helpers": helpers_section,
        "callers": callers_section,
        "serving": serving_section,
        "ingest": lambda found: f"{ingest_section(found)}\n\n{by_checkpoint(found)}",
        "ingest_before": ingest_section,
        "ingest_cuda": ingest_section,
    }
    parts = _parts(measured["steps"]) if "steps" in measured else NOT_MEASURED
    made = {name: make(measured[name]) if name in measured else NOT_MEASURED for name, make in makers.items()}
    return {**made, "parts": parts}


def _parts(measured: dict[str, Any]) -> str:
    head, columns = ["wall s"], []
    for column in measured["parts"]:
        head.append(f"{column['mode']}, {column['dtype']}")
        columns.append({part: median(seconds[part] for seconds in column["rounds"]) for part in column["rounds"][0]})
    wholes = [sum(seconds.values()) for seconds in columns]
    return table(
        head,
        [
            (
                part,
                *(
                    f"{significant(seconds[part])} ({100 * seconds[part] / whole:.0f} %)"
                    for seconds, whole in zip(columns, wholes, strict=True)
                ),
            )
            for part in columns[0]
        ],
    )


def _steps(measured: dict[str, Any]) -> str:
    rows = {(row["dtype"], row["mode"], row["way"]): row for row in measured["rows"]}
    head = ("one step off", *(f"{mode}, {what}" for mode in (POOLED, PREFIX) for what in ("wall s", "CPU s", "÷ all on")))
    parts = []
    for dtype in dict.fromkeys(row["dtype"] for row in measured["rows"]):
        ways = dict.fromkeys(row["way"] for row in measured["rows"] if row["dtype"] == dtype)
        body = [(way, *(cell for mode in (POOLED, PREFIX) for cell in _gain(rows.get((dtype, mode, way))))) for way in ways]
        largest = max(row["max_difference"] for row in measured["rows"] if row["dtype"] == dtype)
        n_rounds = len(rows[dtype, POOLED, ALL_ON]["wall"])
        n, threads = measured["candidates"], measured["machine"]["threads"]
        title = f"{dtype}, {n} candidates, {threads} threads, {n_rounds} rounds; margins differ by {largest:.0e} at most:"
        parts.append(f"{title}\n\n{table(head, body)}")
    return "\n\n".join(parts)


def _gain(row: dict[str, Any] | None) -> Iterable[str]:
    """Return wall and CPU seconds, and how many times the CPU seconds with all steps on it took."""
    if row is None:
        return ("–", "–", "–")
    ratio = median(off / on for off, on in zip(row["cpu"], row["base_cpu"], strict=True))
    return significant(median(row["wall"])), significant(median(row["cpu"])), f"{ratio:.2f}"


def _windows(measured: dict[str, Any]) -> str:
    blocks = [block for block in measured["rows"][0]["wall"] if block != "whole"]
    body = []
    for row in measured["rows"]:
        whole = row["wall"]["whole"]
        shares = [median(part / w for part, w in zip(row["wall"][block], whole, strict=True)) for block in blocks]
        body.append((row["dtype"], f"{row['n_tokens']:,}", significant(median(whole)), *(f"{share:.2f}" for share in shares)))
    head = ("dtype", "tokens", "all queries at once: wall s", *(f"blocks of {block}: ÷" for block in blocks))
    n_rounds = len(measured["rows"][0]["wall"]["whole"])
    about = (
        f"{measured['passages']} passages, windows of {measured['window']} tokens, {measured['machine']['threads']} threads"
    )
    return f"{about}, {n_rounds} rounds:\n\n{table(head, body)}"
