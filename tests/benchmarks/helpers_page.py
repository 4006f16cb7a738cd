"""The section of the page on helper threads."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.tables import significant, table

KEPT, RELEASED = "kept", "let go"


def helpers_section(measured: dict[str, Any]) -> str:
    """Return the table of results."""
    body = []
    for row in measured["rows"]:
        kept, released = row["wall"][KEPT], row["wall"][RELEASED]
        ratio = median(after / before for before, after in zip(kept, released, strict=True))
        body.append((row["dtype"], *(significant(median(walls)) for walls in (kept, released)), f"{ratio:.2f}"))
    row = measured["rows"][0]
    about = (
        f"{measured['machine']['cpu']}, {measured['machine']['threads']} threads, shape of {measured['shape']}, "
        f"{row['passages']} passages of {row['tokens']} tokens, {len(row['wall'][KEPT])} rounds"
    )
    return f"{about}:\n\n{table(('dtype', 'kept: s', 'let go: s', '÷'), body)}"
