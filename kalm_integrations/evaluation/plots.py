"""Plots for the documentation, as SVG that reads on light and on dark pages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kalm_integrations.errors import MissingExtraError

INK = "#808080"
"""Text and axes: as far from white as from black."""
COLOURS = {
    "fp32": "#3b82f6",
    "fp16": "#e8730c",
    "bf16": "#a855f7",
    "int8": "#16a34a",
    "rot4": "#dc2650",
    "rot3": "#0d9488",
    "rot2": "#ca8a04",
}
MARKERS = {"fp32": "o", "fp16": "s", "bf16": "D", "int8": "^", "rot4": "v", "rot3": "P", "rot2": "X"}


def plot_costs(report: Mapping[str, Any], path: Path) -> None:
    """Draw nDCG@10 against bytes per passage, a panel for each collection, with the Pareto line.

    The file holds the report's digest (see `digest`), which tells whether plot and figures belong together.

    Args:
        report: of `compression.to_report`.
        path: the SVG file to write.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, NullFormatter
    except ImportError as error:
        msg = 'plots need matplotlib; install it with: pip install "kalm-integrations[eval]"'
        raise MissingExtraError(msg) from error

    style: dict[Any, Any] = {
        # Text stays text, in the reader's font, and the same figures give the same file.
        "svg.fonttype": "none",
        "svg.hashsalt": "kalm",
        "font.family": "sans-serif",
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    collections = report["collections"]
    with mpl.rc_context(style):
        figure = Figure(figsize=(7, 3.6 * len(collections)), layout="constrained")
        figure.patch.set_alpha(0)
        for axes, collection in zip(figure.subplots(len(collections), squeeze=False)[:, 0], collections, strict=True):
            axes.patch.set_alpha(0)
            costs = collection["costs"]
            for codec in dict.fromkeys(cost["codec"] for cost in costs):
                points = [(cost["mean_bytes"], cost["ndcg"]) for cost in costs if cost["codec"] == codec]
                # Hollow, because fp16 lies under it: the bytes are the same and the order nearly so.
                fill, size = ("none", 8) if codec == "bf16" else ("full", 5)
                look = {"color": COLOURS[codec], "fillstyle": fill, "markersize": size}
                axes.plot(*zip(*points, strict=True), MARKERS[codec], label=codec, **look)
            line = sorted((cost["mean_bytes"], cost["ndcg"], cost["ratio"]) for cost in costs if cost["is_pareto"])
            axes.plot([x for x, _, _ in line], [y for _, y, _ in line], "--", color=INK, linewidth=1, label="Pareto line")
            for x, y, ratio in line:
                axes.annotate(str(ratio), (x, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
            axes.axhline(collection["first_stage_ndcg"], color=INK, linewidth=0.8, linestyle=":")
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(color=INK, alpha=0.25, linewidth=0.5)
            axes.set_title(f"{collection['collection']} (dotted: {collection['first_stage']}; numbers: ratio)", fontsize=10)
            axes.set_xlabel("bytes per passage")
            axes.set_ylabel("nDCG@10")
            axes.margins(y=0.1)
            axes.legend(fontsize=8, framealpha=0, loc="upper left", bbox_to_anchor=(1, 1))
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None, "Description": digest(report)})


def digest(report: Mapping[str, Any]) -> str:
    """Return a hash of the figures that a plot shows."""
    canonical = json.dumps(report, sort_keys=True, separators=(",", ":"))
    return f"figures {hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()}"
