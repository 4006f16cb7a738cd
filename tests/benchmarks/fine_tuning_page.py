"""`python -m benchmarks.fine_tuning_page`: what fine-tuning was worth, as the tables of docs/training.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools.paths import DOCS

from benchmarks.fine_tuning import OUTPUT
from benchmarks.tables import between_marks, table
from kalm_integrations.evaluation.differences import Difference

PAGE = DOCS / "training.md"
MARK = "fine-tuning"
SYSTEMS = ("alone", "summed")
FIRST_STAGES = {"code": "BM25", "names cut": "BM25, names cut into words"}
STANDING = ("muon", "mean")
"""Recipes that are shown beside the first stages."""


def tables(measured: dict[str, Any]) -> str:
    """Return where the models stand with each first stage, and what each recipe changes."""
    tasks, recipes = measured["tasks"], measured["recipes"]
    body: list[list[str]] = []
    for name, first_stage in FIRST_STAGES.items():
        task = tasks[name]
        body.append([f"{first_stage}, recall {task['recall']:.3f}", _mean(task["means"]["bm25"]), "", "", ""])
        start = [cell for s in SYSTEMS for cell in (_mean(task["means"][s]), _shown(task["differences"][s]))]
        body.append(["`pico`", *start])
        for row in (recipes[shown] for shown in STANDING if shown in recipes):
            cells = [cell for s in SYSTEMS for cell in (_mean(row[name][s]["mean"]), _shown(row[name][s]["to bm25"]))]
            body.append([row["recipe"]["text"], *cells])
    stands = table(["order", "alone", "to BM25", "+ BM25", "to BM25"], body)
    body = [
        [
            row["recipe"]["text"],
            *(_shown(row[name][s]["to start"]) for name in ("code", "squad") for s in SYSTEMS),
            f"{row['cpu_seconds'] / 60:.1f}",
        ]
        for row in recipes.values()
    ]
    changes = table(["recipe", "code, alone", "code, + BM25", "SQuAD, alone", "SQuAD, + BM25", "CPU minutes"], body)
    return (
        f"nDCG@10 at ratio {measured['ratio']}, on {tasks['code']['queries']:,} queries. All order the {measured['top_k']} "
        f"that BM25 finds; its recall is the most that any order of them can reach:\n\n{stands}\n\n"
        f"What each recipe changes against `pico`, with BM25 as it is; {measured['steps']} steps each. SQuAD is "
        f"{tasks['squad']['queries']:,} queries of `squad-dev`:\n\n{changes}"
    )


def updated(measured: dict[str, Any] | None = None) -> str:
    """Return the page with its tables as they were measured."""
    found = json.loads(OUTPUT.read_text(encoding="utf-8")) if measured is None else measured
    return between_marks(PAGE.read_text(encoding="utf-8"), MARK, tables(found))


def _mean(value: float) -> str:
    return f"{value:.3f}"


def _shown(difference: dict[str, float]) -> str:
    return str(Difference(**difference))


if __name__ == "__main__":
    Path(PAGE).write_text(updated(), encoding="utf-8")
