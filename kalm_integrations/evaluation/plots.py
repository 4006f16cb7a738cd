"""Plots of figures, which read on light and on dark pages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kalm_integrations.errors import MissingExtraError
from kalm_integrations.evaluation.reliability import N_BINS, Reliability

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


STYLE: dict[Any, Any] = {
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


def plot_costs(report: Mapping[str, Any], path: Path) -> None:
    """Draw nDCG@10 against bytes per passage, a panel for each collection, with the Pareto line.

    Bars show the 95 % interval of the difference to ratio 1 in float32, around the setting's own nDCG@10. The first stage's is
    a line where it is near. The file holds the
    report's digest (see `digest`), which tells whether plot and figures belong together.

    Args:
        report: of `compression.to_report`.
        path: the SVG file to write.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    mpl = _matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    collections = report["collections"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 3.6 * len(collections)), layout="constrained")
        figure.patch.set_alpha(0)
        for axes, collection in zip(figure.subplots(len(collections), squeeze=False)[:, 0], collections, strict=True):
            axes.patch.set_alpha(0)
            costs = collection["costs"]
            for codec in dict.fromkeys(cost["codec"] for cost in costs):
                own = [cost for cost in costs if cost["codec"] == codec]
                bytes_, ndcg = [cost["mean_bytes"] for cost in own], [cost["ndcg"] for cost in own]
                differences = [cost["difference"] for cost in own]
                below, above = ([abs(d["mean"] - d[end]) for d in differences] for end in ("low", "high"))
                axes.errorbar(bytes_, ndcg, (below, above), ecolor=COLOURS[codec], fmt="none", elinewidth=1, alpha=0.5)
                # Hollow, because fp16 lies under it: the bytes are the same and the order nearly so.
                fill, size = ("none", 8) if codec == "bf16" else ("full", 5)
                look = {"color": COLOURS[codec], "fillstyle": fill, "markersize": size}
                axes.plot(bytes_, ndcg, MARKERS[codec], label=codec, **look)
            line = sorted((cost["mean_bytes"], cost["ndcg"], cost["ratio"]) for cost in costs if cost["is_pareto"])
            axes.plot([x for x, _, _ in line], [y for _, y, _ in line], "--", color=INK, linewidth=1, label="Pareto line")
            for x, y, ratio in line:
                axes.annotate(str(ratio), (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
            axes.margins(y=0.1)
            first_stage = f"{collection['first_stage']}: {collection['first_stage_ndcg']:.3f}"
            low, high = axes.get_ylim()
            if 2 * low - high < collection["first_stage_ndcg"] < 2 * high - low:
                axes.axhline(collection["first_stage_ndcg"], color=INK, linewidth=0.8, linestyle=":")
                first_stage += ", dotted"
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(color=INK, alpha=0.25, linewidth=0.5)
            title = f"{collection['collection']}: {collection['n_queries']:,} queries ({first_stage})"
            legend = "numbers: ratio; bars: 95 % interval of the difference to ratio 1 in fp32"
            axes.set_title(f"{title}\n{legend}", fontsize=9)
            axes.set_xlabel("bytes per passage")
            axes.set_ylabel("nDCG@10")
            axes.legend(fontsize=8, framealpha=0, loc="upper left", bbox_to_anchor=(1, 1))
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None, "Description": digest(report)})


def plot_reliability(measured: Mapping[str, Reliability], path: Path) -> None:
    """Draw in each bin how many pairs are relevant, against how many should be, and below it how many pairs the bin has.

    Bars show the 95 % interval of each share.

    Args:
        measured: by name, such as "plain" and "calibrated".
        path: of the picture; its suffix names the format.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    mpl = _matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5, 6.4), layout="constrained")
        figure.patch.set_alpha(0)
        shares, sizes = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        shares.plot([0, 1], [0, 1], color=INK, linestyle=":", label="probabilities")
        for place, ((name, reliability), colour) in enumerate(zip(measured.items(), ("fp32", "fp16"), strict=False)):
            look = {"color": COLOURS[colour], "label": f"{name} (error {reliability.calibration_error:.3f})"}
            bins = reliability.bins
            below, above = ([b.share_relevant - b.low for b in bins], [b.high - b.share_relevant for b in bins])
            x, y = [b.mean_score for b in bins], [b.share_relevant for b in bins]
            shares.errorbar(x, y, (below, above), marker="o", markersize=5, capsize=3, elinewidth=1, **look)
            # Side by side in the range of their bin.
            width = 0.4 / N_BINS
            left = [int(b.mean_score * N_BINS) / N_BINS + (0.1 + place * 0.4) / N_BINS for b in bins]
            sizes.bar(left, [b.n_pairs for b in bins], width, align="edge", color=COLOURS[colour])
        shares.set(ylabel="share of relevant passages (95 % interval)", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        shares.legend(framealpha=0)
        sizes.set(xlabel="mean score", ylabel="pairs in the bin", yscale="log")
        # A bar of one pair is to be seen.
        sizes.set_ylim(bottom=0.5)
        sizes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        for axes in (shares, sizes):
            axes.patch.set_alpha(0)
            axes.grid(color=INK, alpha=0.25, linewidth=0.5)
        figure.savefig(path, dpi=150, transparent=True, metadata={"Date": None} if path.suffix == ".svg" else None)


def _matplotlib() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        msg = 'plots need matplotlib; install it with: pip install "kalm-integrations[eval]"'
        raise MissingExtraError(msg) from error
    return mpl


def digest(report: Mapping[str, Any]) -> str:
    """Return a hash of the figures that a plot shows."""
    canonical = json.dumps(report, sort_keys=True, separators=(",", ":"))
    return f"figures {hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()}"
