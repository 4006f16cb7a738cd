"""Plots as SVG, in colours that can be read on a light and on a dark page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.results import Results, Row

INK = "#7a828c"
OURS, REFERENCE, PEER = "#2f8fd8", "#d9822b", "#9aa0a8"

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kalm",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
}

AXES = {"candidates": "candidates", "passage_tokens": "passage tokens", "n_new": "prompt tokens that depend on the query"}


def draw_rows(rows: Sequence[Row], path: Path) -> None:
    """Draw the seconds of rows of one dtype and size as points, slowest first."""
    rows = sorted(rows, key=lambda row: row.seconds)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.38 * len(rows) + 1.2), layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(rows):
            axes.plot(row.seconds, place, "o", color=_colour(row), markersize=8)
            axes.annotate(f"{row.seconds:.3g}", (row.seconds, place), (9, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.grid(axis="x", color=INK, alpha=0.25)
        axes.set_xscale("log")
        axes.set_xlabel(
            f"seconds for {rows[0].candidates} candidates of {rows[0].passage_tokens:,} tokens, {rows[0].dtype}, logarithmic"
        )
        axes.margins(x=0.12)
        kinds = {"ours": OURS, "the reference": REFERENCE, "other rerankers' shapes": PEER}
        drawn = {_colour(row) for row in rows}
        dots = [
            Line2D([], [], linestyle="", marker="o", markersize=8, color=colour)
            for colour in kinds.values()
            if colour in drawn
        ]
        names = [name for name, colour in kinds.items() if colour in drawn]
        figure.legend(dots, names, loc="outside upper left", ncols=len(names), frameon=False, labelcolor=INK)
        _save(figure, path)


def draw_curves(results: Results, path: Path) -> None:
    """Draw growth along each axis."""
    curves = results.run["curves"]
    kinds = list(dict.fromkeys(curve["axis"] for curve in curves))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3 * len(kinds)), layout="constrained")
        for axes, kind in zip(figure.subplots(len(kinds), 1, squeeze=False)[:, 0], kinds, strict=True):
            _draw_axis(axes, [curve for curve in curves if curve["axis"] == kind])
            axes.set_xlabel(AXES[kind])
        _save(figure, path)


def _draw_axis(axes: Axes, curves: list[dict]) -> None:
    for curve, colour in zip(curves, (REFERENCE, OURS), strict=True):
        rows = [Row(point) for point in curve["points"]]
        axes.plot([row.at for row in rows], [row.seconds for row in rows], "o-", color=colour, label=curve["name"])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    places = [point["at"] for point in curves[0]["points"]]
    axes.set_xticks(places, [str(place) for place in places])
    axes.minorticks_off()
    candidates = {row["candidates"] for curve in curves for row in curve["points"]}
    axes.set_ylabel("seconds" if len(candidates) > 1 else f"seconds for {candidates.pop()} candidates")
    axes.legend(frameon=False, labelcolor=INK)


def _colour(row: Row) -> str:
    if row.name.startswith("ours"):
        return OURS
    return REFERENCE if row.name.startswith("reference") else PEER


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
