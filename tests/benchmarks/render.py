"""docs/benchmarks.md and its plots, from results.json and the results of the trials alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any

from benchmarks import plan, plots, trials
from benchmarks.bars import BARS
from benchmarks.plan import LONG, SHORT
from benchmarks.results import Results, Row
from benchmarks.tables import significant, table
from benchmarks.trials import NOT_MEASURED
from kalm_integrations.planning import arithmetic

RESULTS = trials.FOLDER / "results.json"
PAGE = Path(__file__).with_name("page.md")

LEADING = ("float32", 256, 100)
"""The group whose plot the page begins with: dtype, passage tokens and candidates."""

CODEC_RATIOS = (2, 4, 16)
"""Ratios whose bytes the page shows; results.json has more."""


def render(results_path: Path, page_path: Path) -> None:
    """Write the page, and its plots beside the results."""
    runs = json.loads(results_path.read_text()) if results_path.exists() else {}
    tried = trials.read(results_path.parent)
    page_path.write_text(make_page(runs, tried, results_path.parent.name), encoding="utf-8")
    for name, draw in _plots(_cpu(runs)).items():
        draw(results_path.parent / f"{name}.svg")


def make_page(runs: dict[str, Any], tried: dict[str, Any], folder: str = RESULTS.parent.name) -> str:
    """Return the page for runs by "device shape" and trials by name; `folder` holds the plots, beside the page."""
    results = _cpu(runs)
    images = {name: f"![{words}]({folder}/{name}.svg)\n\n" for name, words in _alternatives(results).items()}
    cuda = {name: Results(run) for name, run in runs.items() if name.startswith("cuda")}
    sections = {
        "lead": _lead(results, images),
        "machine": _machine(results),
        "bars": _bars(results),
        "rows": "\n\n".join(_rows_sections(results, images)) or NOT_MEASURED,
        "long_prompt": _long_prompt(results),
        "floor_formula": arithmetic.__doc__.partition("\n\n")[2].strip(),
        "rates": _rates(results),
        "floor": _floor(results),
        "curves": images.get("growth", "") + _curves(results),
        "memory": _memory(results),
        "storage": _storage(results),
        "prefix_states": _prefix_states(results),
        "cuda": "\n\n".join(_cuda_section(name, run) for name, run in cuda.items()) or f"{NOT_MEASURED} No GPU was at hand.",
        **trials.sections(tried),
    }
    return Template(PAGE.read_text(encoding="utf-8")).substitute(sections)


def _cpu(runs: dict[str, Any]) -> Results:
    """Return the first run on a CPU."""
    return Results(next((run for name, run in runs.items() if name.startswith("cpu")), {}))


def _plots(results: Results) -> dict[str, Any]:
    """Return what draws each plot that the results have figures for."""
    drawn: dict[str, Any] = {}
    for group, rows in _groups(results).items():
        drawn[_slug(*group)] = lambda path, rows=rows: plots.draw_rows(rows, path)
    if results.run.get("curves"):
        drawn["growth"] = lambda path: plots.draw_curves(results, path)
    return drawn


def _alternatives(results: Results) -> dict[str, str]:
    """Return what each plot shows, for those who do not see it."""
    words = {}
    for group, rows in _groups(results).items():
        shown = ", ".join(f"{row.name} {significant(row.seconds)}" for row in sorted(rows, key=lambda row: -row.seconds))
        words[_slug(*group)] = f"Seconds for {_title(*group)}: {shown}"
    if results.run.get("curves"):
        grows = ", ".join(plots.AXES[axis] for axis in dict.fromkeys(curve["axis"] for curve in results.run["curves"]))
        words["growth"] = f"Seconds as these grow, with stored encodings and with prefix states: {grows}; tables below"
    return words


def _lead(results: Results, images: dict[str, str]) -> str:
    """Return the plot that the page begins with, and what it shows."""
    rows = [results.find(name) for name in (plan.REFERENCE_COLD, plan.OURS_COLD, plan.OURS_POOLED, plan.OURS_PREFIX)]
    if None in rows:
        return NOT_MEASURED
    reference, cold, pooled, prefix = (significant(row.seconds) for row in rows)
    return (
        f"{images[_slug(*LEADING)]}For {_title(*LEADING)}, the reference takes {reference} seconds. "
        f"This package takes {cold} seconds with nothing stored,\n{pooled} with stored encodings and {prefix} "
        "with prefix states in memory. [How it is measured](#how-it-is-measured) explains the names of the rows."
    )


def _groups(results: Results) -> dict[tuple[str, int, int], list[Row]]:
    """Return the rows that belong together, by dtype, passage tokens and candidates."""
    groups: dict[tuple[str, int, int], list[Row]] = {}
    for row in results.rows:
        if row.prompt == SHORT:
            groups.setdefault((row.dtype, row.passage_tokens, row.candidates), []).append(row)
    return groups


def _slug(dtype: str, length: int, candidates: int) -> str:
    return f"{dtype}-{candidates}x{length}"


def _title(dtype: str, length: int, candidates: int) -> str:
    return f"{candidates:,} candidates × {length:,} tokens, {dtype}"


def _machine(results: Results) -> str:
    facts = results.run.get("machine")
    if facts is None:
        return NOT_MEASURED
    packages = ", ".join(f"{name} {number}" for name, number in facts["packages"].items())
    environment = ", ".join(f"`{name}={value}`" for name, value in facts["environment"].items())
    lines = {
        "processor": f"{facts['cpu']}, {facts['cores']} cores, {', '.join(facts['instruction_sets'])}",
        "threads": facts["threads"],
        "memory": f"{facts['memory_bytes'] / 2**30:.0f} GiB",
        "GPU": facts["gpu"],
        "system": f"{facts['system']}, Python {facts['python']}",
        "packages": packages,
        "environment": environment,
        "load before the run": f"{facts['load_before']:.2f}",
    }
    return table(("", ""), [(name, value) for name, value in lines.items() if value is not None])


def _bars(results: Results) -> str:
    rows = [(bar.text, *bar.verdict(results)) for bar in BARS]
    return table(("100 candidates × 256 tokens", "bar", "measured", ""), rows)


def _rows_sections(results: Results, images: dict[str, str]) -> Iterable[str]:
    for group, rows in _groups(results).items():
        image = "" if group == LEADING else images[_slug(*group)]
        yield f"### {_title(*group)}\n\n{image}{_rows_table(rows)}"


def _rows_table(rows: Sequence[Row]) -> str:
    cold = next((row for row in rows if row.name == plan.REFERENCE_COLD), None)
    head = (
        "",
        "wall s",
        "CPU s",
        "reference cold ÷ this",
        "prompt tokens",
        "threads",
        "rounds × candidates",
        "max \\|Δp\\|",
    )
    return table(
        head,
        [
            (
                row.name,
                significant(row.seconds),
                significant(row.cpu_seconds),
                "–" if cold is None else significant(cold.seconds / row.seconds),
                row.prompt.n_query if row.name in plan.BARE_QUERY else row.prompt.n_tokens,
                row.threads,
                f"{row.rounds} × {row.measured}" + (", scaled" if row.measured != row.candidates else ""),
                "–" if row.max_difference is None else f"{row.max_difference:.1e}",
            )
            for row in rows
        ],
    )


def _long_prompt(results: Results) -> str:
    rows = [row for row in results.rows if row.prompt == LONG]
    if not rows:
        return NOT_MEASURED
    return table(
        ("", "dtype", "wall s", "CPU s", "share of the floor"),
        [
            (row.name, row.dtype, significant(row.seconds), significant(row.cpu_seconds), f"{results.floor_share(row):.2f}")
            for row in rows
        ],
    )


def _rates(results: Results) -> str:
    dtypes = list(results.run.get("rates", {}))
    if not dtypes:
        return NOT_MEASURED
    shapes = arithmetic.product_shapes(results.widths)
    rates = {dtype: results.rates(dtype) for dtype in dtypes}
    return table(
        ("product", "in → out", *(f"{dtype}, GFLOP/s" for dtype in dtypes)),
        [
            (name, f"{n_in:,} → {n_out:,}", *(f"{2 * rates[dtype][name] / 1e9:,.0f}" for dtype in dtypes))
            for name, (n_in, n_out) in shapes.items()
        ],
    )


def _floor(results: Results) -> str:
    rows = [row for row in results.rows if row.name in (plan.OURS_COLD, plan.OURS_POOLED, plan.OURS_PREFIX)]
    if not rows:
        return NOT_MEASURED
    return table(
        ("", "dtype", "passage tokens", "prompt tokens", "GFLOP", "floor s", "measured s", "share"),
        [
            (
                row.name,
                row.dtype,
                f"{row.passage_tokens:,}",
                _prompt(row),
                f"{2 * sum(results.multiply_adds(row).values()) / 1e9:,.0f}",
                significant(results.floor_seconds(row)),
                significant(row.seconds),
                f"{results.floor_share(row):.2f}",
            )
            for row in rows
        ],
    )


def _curves(results: Results) -> str:
    curves = results.run.get("curves", [])
    if not curves:
        return NOT_MEASURED
    tables = []
    for axis in dict.fromkeys(curve["axis"] for curve in curves):
        group = [curve for curve in curves if curve["axis"] == axis]
        columns = [[Row(point) for point in curve["points"]] for curve in group]
        base = columns[0][0]
        held = {
            "candidates": "" if axis == "candidates" else f"{base.candidates} candidates",
            "passage_tokens": "" if axis == "passage_tokens" else f"passages of {base.passage_tokens} tokens",
            "n_new": "" if axis == "n_new" else f"a prompt of {base.prompt.n_prefix} + {base.prompt.n_new} tokens",
        }
        head = (plots.AXES[axis], *(f"{curve['name']}, s" for curve in group))
        body = [(f"{rows[0].at:,}", *(significant(row.seconds) for row in rows)) for rows in zip(*columns, strict=True)]
        with_what = ", ".join(text for text in held.values() if text)
        tables.append(f"{base.dtype}, {with_what}:\n\n{table(head, body)}")
    return "\n\n".join(tables)


def _memory(results: Results) -> str:
    rows = results.run.get("memory", [])
    if not rows:
        return NOT_MEASURED
    return table(
        ("", "dtype", "candidates", "peak memory"),
        [(row["name"], row["dtype"], row["candidates"], f"{row['peak_bytes'] / 2**20:,.0f} MiB") for row in rows],
    )


def _storage(results: Results) -> str:
    codecs = results.run.get("storage", [])
    if not codecs:
        return NOT_MEASURED
    sizes = {codec["codec"]: {size["ratio"]: size for size in codec["sizes"]} for codec in codecs}
    count = codecs[0]["read_n"]
    return table(
        (
            f"codec, passages of {codecs[0]['n_tokens']} tokens",
            *(f"bytes, ratio {ratio}" for ratio in CODEC_RATIOS),
            "characters in metadata, ratio 4",
            f"reading {count} back, ratio 4",
        ),
        [
            (
                codec["codec"],
                *(f"{sizes[codec['codec']][ratio]['bytes']:,}" for ratio in CODEC_RATIOS),
                f"{sizes[codec['codec']][4]['characters']:,}",
                f"{codec['read_ms']:.1f} ms",
            )
            for codec in codecs
        ],
    )


def _prefix_states(results: Results) -> str:
    rows = results.run.get("prefix_states", [])
    if not rows:
        return NOT_MEASURED
    sizes = {(row["dtype"], row["n_tokens"]): row["bytes"] for row in rows}
    lengths = sorted({n_tokens for _, n_tokens in sizes})
    return table(
        ("kept in", *(f"passages of {n_tokens:,} tokens" for n_tokens in lengths)),
        [
            (dtype, *(f"{sizes[dtype, n_tokens] / 2**20:.2f} MiB" for n_tokens in lengths))
            for dtype in dict.fromkeys(dtype for dtype, _ in sizes)
        ],
    )


def _cuda_section(name: str, results: Results) -> str:
    shape = name.partition(" ")[2].capitalize()
    parts = [f"### {shape}, {results.run['machine']['gpu']}", _machine(results)]
    for group, rows in _groups(results).items():
        parts += [f"{_title(*group)}:", _rows_table(rows)]
    return "\n\n".join([*parts, _rates(results), _floor(results)])


def _prompt(row: Row) -> str:
    return f"{row.prompt.n_prefix} + {row.prompt.n_new}"
