"""`python -m benchmarks.long_passages_page`: what the ways to read long passages are worth, as tables of their page.

With the path of other results, of another checkpoint for example, it prints their tables.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tools.paths import DOCS

from benchmarks.long_passages import ALL, COMPARED, CUT, NDCG, SLOW, TOP, WARM
from benchmarks.tables import between_marks, significant, table
from benchmarks.trials import FOLDER
from kalm_integrations.evaluation.differences import Difference

PAGE = DOCS / "tasks" / "long-documents.md"
MEASURED = FOLDER / "long_passages.json"


def quality(measured: dict[str, Any]) -> str:
    """Return what each way is worth, and its differences to others, by the place of the answer."""
    groups = measured["groups"]
    names = list(groups[ALL]["ways"])
    values = [
        [*_group(name, row), *(f"{row['ways'][way][NDCG]:.3f} / {row['ways'][way][TOP]:.2f}" for way in names)]
        for name, row in groups.items()
    ]
    differences = [
        [*_group(name, row), *(str(Difference(**found)) for found in row["differences"])] for name, row in groups.items()
    ]
    head = ["the answer lies in", "questions"]
    return (
        f"{groups[ALL]['questions']:,} questions, {measured['passages']:,} passages of {measured['tokens']:,.0f} tokens on "
        f"average; BM25's {measured['candidates']} best have {100 * measured['recall']:.0f} % of the questions' own passages. "
        f"{NDCG} / share of the questions whose own passage comes first:\n\n{table([*head, *names], values)}\n\n"
        f"Differences in {NDCG}, with 95 % intervals:\n\n"
        f"{table([*head, *(f'{way}, to {base}' for way, base in COMPARED)], differences)}\n\n"
        f"For {100 * measured['window_hits']:.0f} % of the questions, the best window of their own passage holds an answer."
    )


def costs(measured: dict[str, Any]) -> str:
    """Return what each way costs, and how much more that is than for cut passages."""
    rows = measured["costs"]
    kinds = {"encode": 1.0, "bytes": 1e-3, WARM: 1e3, SLOW: 1e3}
    body = [
        [way, *(f"{significant(unit * row[kind])} (× {row[kind] / rows[CUT][kind]:.1f})" for kind, unit in kinds.items())]
        for way, row in rows.items()
    ]
    head = ["way", "encode a passage: s", "metadata: kB", f"a query, {WARM}: ms", f"a query, {SLOW}: ms"]
    facts = measured["machine"]
    place = facts["gpu"] or f"one thread of {facts['cpu']}"
    return f"{measured['model']}, {place}; in brackets, times what cut passages cost:\n\n{table(head, body)}"


def _group(name: str, row: dict[str, Any]) -> list[str]:
    return [name, f"{row['questions']:,}"]


MAKERS = {"long passages": quality, "long passages' costs": costs}


def updated(measured: dict[str, Any] | None = None) -> str:
    """Return the page with its tables as they were measured."""
    found = json.loads(MEASURED.read_text(encoding="utf-8")) if measured is None else measured
    text = PAGE.read_text(encoding="utf-8")
    for name, make in MAKERS.items():
        text = between_marks(text, name, make(found))
    return text


if __name__ == "__main__":
    if paths := sys.argv[1:]:
        for path in paths:
            measured = json.loads(Path(path).read_text(encoding="utf-8"))
            print("\n\n".join(make(measured) for make in MAKERS.values()))
    else:
        PAGE.write_text(updated(), encoding="utf-8")
