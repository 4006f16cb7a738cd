"""The tables of docs/evaluation.md and docs/compression.md, from the figures in docs/figures/.

`python -m tools.evaluation_pages`, from tests/, writes them. The figures are what
`kalm eval compression --output docs/figures` writes, and the summaries of `kalm eval mteb`, copied to docs/figures/mteb/.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kalm_integrations.evaluation import compression
from tools.paths import DOCS

FIGURES = DOCS / "figures"


def costs() -> str:
    return compression.to_markdown(read("compression.json"))


def results() -> str:
    """What others published, and below it what was measured with this package; blank where nothing was run."""
    published = read("published.json")
    columns: list[str] = published["columns"]
    measured = {}
    for path in sorted(FIGURES.glob("mteb/*.json")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        measured[summary["model"], summary["label"]] = 100 * summary["mean"]
    rows = [(row["system"], row["version"] or "as published", row["values"]) for row in published["rows"]]
    rows += [
        (row["system"], "this package", [measured.get((row["model"], column)) for column in columns])
        for row in published["ours"]
    ]
    lines = [f"| system | figures | {' | '.join(columns)} |", f"|---|---|{'--:|' * len(columns)}"]
    for system, source, values in rows:
        lines.append(f"| {system} | {source} | {' | '.join('' if v is None else f'{v:.2f}' for v in values)} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {"costs": costs, "results": results}
PAGES = [DOCS / "compression.md", DOCS / "evaluation.md"]


def read(name: str) -> dict[str, Any]:
    return json.loads((FIGURES / name).read_text(encoding="utf-8"))


def updated(page: Path) -> str:
    """Return a page with its tables as the figures make them."""
    return filled(page, "tools.evaluation_pages", TABLES)


def filled(page: Path, command: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """Return a page whose tables of one command (`python -m`) are made anew; those of others stay as they are."""
    text = page.read_text(encoding="utf-8")

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        table = tables[name]().strip()
        return f"<!-- {name}: python -m {command} -->\n\n{table}\n\n<!-- end of {name} -->"

    pattern = rf"<!-- (?P<name>\w+): python -m {re.escape(command)} -->.*?<!-- end of (?P=name) -->"
    text, n = re.subn(pattern, fill, text, flags=re.DOTALL)
    assert n, f"{page} must have a table to fill"
    return text


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(updated(path), encoding="utf-8")
