"""`python -m benchmarks measure` writes docs/benchmarks/results.json, `python -m benchmarks render` the page from it."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import floor, machine, plan
from benchmarks.curves import measure_curves
from benchmarks.memory import measure_memory
from benchmarks.plan import Plan
from benchmarks.render import RESULTS, render
from benchmarks.rows import Models, Scores, measure_rows, progress
from benchmarks.storage import measure_prefix_states, measure_storage
from benchmarks.workload import MAKERS, Workload, make_workload_checkpoint
from kalm_integrations.planning.arithmetic import Widths

DTYPES = ("float32", "bfloat16")
PARTS = ("rows", "curves", "storage", "memory")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and measure or render."""
    options = _parser().parse_args(arguments)
    if options.command == "render":
        render(options.results, options.results.parent.with_suffix(".md"))
        return
    if arguments is None:
        machine.start_again(options.malloc)
        logging.disable(logging.WARNING)
    if options.threads:
        torch.set_num_threads(options.threads)
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    name = f"{options.device} {options.shape}"
    facts = machine.describe(options.device)
    before = results.get(name, {})
    # Parts measured elsewhere, or with other versions, do not stand beside these.
    kept = before if _comparable(before.get("machine", {})) == _comparable(facts) else {}
    run = results[name] = {**kept, "machine": facts}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    # Written after every part: what has taken minutes is not lost with what comes after it.
    for part in measure(_plan(options), options.shape, options.device, options.parts):
        run.update(part)
        options.results.write_text(json.dumps(results, indent=1) + "\n")


def measure(chosen: Plan, shape: str, device: str, parts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measure the parts of a plan on a random checkpoint of a shape.

    Yields:
        The widths of the shape (`config`), then what each part gave; with the rows, the `rates` of matrix products by dtype
        and round, in multiply-adds per second.
    """
    with tempfile.TemporaryDirectory() as folder:
        progress(f"making a checkpoint of shape {shape}")
        workload = Workload(make_workload_checkpoint(shape, Path(folder)))
        dtypes = list(dict.fromkeys(row.dtype for row in chosen.rows))
        is_toy = shape == "toy"

        def models_of(dtype: str) -> Models:
            return Models(workload, dtype, device, are_peers_tiny=is_toy)

        first = models_of(dtypes[0])
        widths = Widths.of(first.encoder.runtime.checkpoint.decoder_config)
        yield {"config": asdict(widths)}
        if "rows" in parts:
            rows: list[dict[str, Any]] = []
            rates: dict[str, list[dict[str, float]]] = {dtype: [] for dtype in dtypes}
            expected: Scores = {}
            for dtype in dtypes:
                rows += measure_rows(
                    [row for row in chosen.rows if row.dtype == dtype],
                    models_of(dtype),
                    expected,
                    each_round=lambda dtype=dtype: rates[dtype].append(
                        floor.measure_rates(widths, dtype, device, chosen.rate_seconds)
                    ),
                )
                # Models have cycles; the next dtype needs their memory.
                gc.collect()
                yield {"rows": rows, "rates": {name: rounds for name, rounds in rates.items() if rounds}}
        if "curves" in parts and chosen.curves:
            yield {"curves": measure_curves(chosen.curves, first)}
        if "storage" in parts and chosen.storage_passages:
            lengths = sorted({row.passage_tokens for row in chosen.rows})
            yield {
                "storage": measure_storage(workload, first.encoder, lengths[0], chosen.storage_passages),
                "prefix_states": measure_prefix_states(first, lengths),
            }
        if "memory" in parts and chosen.memory:
            yield {"memory": measure_memory(chosen.memory, workload, first.encoder, chosen.memory_passage_tokens)}


def _plan(options: argparse.Namespace) -> Plan:
    """Return the plan for the options, cut down to the rows that were asked for."""
    makers = {"toy": plan.toy_plan, "cpu": plan.cpu_plan, "cuda": plan.cuda_plan}
    make = makers["toy" if options.shape == "toy" else options.device.partition(":")[0]]
    whole = make(options.dtypes) if options.dtypes else make()
    rows = [
        replace(row, rounds=min(row.rounds, options.max_rounds or row.rounds))
        for row in whole.rows
        if not options.only or any(text in row.name for text in options.only)
        if not options.passage_tokens or row.passage_tokens in options.passage_tokens
    ]
    if not rows:
        msg = "--only and --passage-tokens must leave a row, but none is left; see benchmarks/plan.py"
        raise SystemExit(msg)
    return replace(whole, rows=tuple(rows))


def _comparable(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name != "load_before"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="measure, and put the results into the file")
    rendering = commands.add_parser("render", help="write page and plots from the results, beside their folder")
    for command in (measuring, rendering):
        command.add_argument("--results", type=Path, default=RESULTS, help="default: docs/benchmarks/results.json")
    measuring.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 …")
    measuring.add_argument("--shape", choices=MAKERS, default="nano", help="toy measures everything once, in seconds")
    measuring.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is not named keeps its results")
    measuring.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: both; bfloat16 on a GPU")
    measuring.add_argument("--only", nargs="+", metavar="TEXT", help="rows whose name contains one of these")
    measuring.add_argument("--passage-tokens", nargs="+", type=int, help="rows of these lengths")
    measuring.add_argument("--max-rounds", type=int, help="bound of the rounds of a row")
    measuring.add_argument("--threads", type=int, help="default: what PyTorch chooses")
    measuring.add_argument("--malloc", choices=machine.MALLOC, default="tuned", help="glibc: leave its thresholds alone")
    return parser


if __name__ == "__main__":
    main()
