"""`kalm encode --engine ray`."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Any

from kalm_integrations.cli.terminal import describe_windows, note


class Engine(str, Enum):
    """Where a corpus is encoded."""

    LOCAL = "local"
    RAY = "ray"


def encode_on_ray(source: Path, output: Path, model: str, **settings: Any) -> None:
    """Encode a corpus on a Ray cluster, and say what was done."""
    from kalm_integrations.bulk.ray import encode_with_ray

    given = {name: value for name, value in settings.items() if value is not None}
    result = encode_with_ray(_address(source), _address(output), model=model, **given)
    kept = f"; {result.n_kept:,} of them were there before" if result.n_kept else ""
    counts = result.counts
    note(f"{result.n_rows:,} rows are in {_address(output)}{kept}")
    note(
        f"{counts.encoded:,} passages encoded in {result.seconds:.1f} s, "
        f"{describe_windows(counts.windowed, counts.truncated)}; {counts.passed_through:,} had a valid encoding"
    )


def _address(path: Path) -> str:
    # Of the slashes in s3://bucket, pathlib keeps one.
    return re.sub(r"^([a-z][a-z0-9+.-]+):/(?=[^/])", r"\1://", str(path))
