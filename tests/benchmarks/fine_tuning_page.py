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


def tables(measured: dict[str, Any]) -> str:
    """Return where the models stand, and what each recipe changes."""
    code, squad = (measured["tasks"][name] for name in ("code", "squad"))
    main, *_ = measured["recipes"].values()
    head = [
        f"code, {code['queries']:,} queries",
        "alone",
        "to BM25",
        "+ BM25",
        "to BM25",
    ]
    start = [cell for s in SYSTEMS for cell in (_mean(code["means"][s]), _shown(code["differences"][s]))]
    tuned = [cell for s in SYSTEMS for cell in (_mean(main["code"][s]["mean"]), _shown(main["code"][s]["to bm25"]))]
    stands = table(head, [["BM25", _mean(code["means"]["bm25"]), "", "", ""], ["`pico`", *start], ["fine-tuned", *tuned]])
    body = [
        [
            row["recipe"]["text"],
            *(_shown(row["code"][s]["to start"]) for s in SYSTEMS),
            *(_shown(row["squad"][s]["to start"]) for s in SYSTEMS),
            f"{row['cpu_seconds'] / 60:.1f}",
        ]
        for row in measured["recipes"].values()
    ]
    changes = table(
        ["recipe", "code, alone", "code, + BM25", "squad-dev, alone", "squad-dev, + BM25", "CPU minutes"],
        body,
    )
    recall = f"BM25 has the right function among its {measured['top_k']} for {100 * code['recall']:.0f} % of the queries"
    return (
        f"nDCG@10 at ratio {measured['ratio']}; {recall}, so no order of them is above {code['recall']:.3f}.\n\n{stands}\n\n"
        f"What each recipe changes against `pico`; {measured['steps']} steps each, and {squad['queries']:,} queries of "
        f"`squad-dev`:\n\n{changes}"
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
