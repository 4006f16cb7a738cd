"""How our seconds grow with candidates, passage length and query length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.plan import CurveSpec
from benchmarks.rows import Models, measure_rows


def measure_curves(curves: Sequence[CurveSpec], models: Models) -> list[dict[str, Any]]:
    """Measure each curve's points in interleaved rounds.

    Returns:
        `axis`, `name` and `dtype` of each curve, and its `points`: what `measure_rows` returns, with the place on the axis.
    """
    measured = []
    for curve in curves:
        rows = measure_rows([curve.at(point) for point in curve.points], models, expected={})
        points = [{"at": point, **row} for point, row in zip(curve.points, rows, strict=True)]
        measured.append({"axis": curve.axis, "name": curve.base.name, "dtype": curve.base.dtype, "points": points})
    return measured
