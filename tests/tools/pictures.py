"""The pictures and the table of the first pages. `python -m tools.pictures`, in tests/, writes them from the figures.

`docs/figures/time.svg` shows the seconds of docs/benchmarks/results.json, `docs/figures/flow.svg` what happens at ingest and
at query time. The table of checkpoints in docs/index.md takes sizes and seconds from `kalm plan`, and quality from
docs/figures/published.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks import plan
from benchmarks.render import RESULTS
from benchmarks.results import Results
from benchmarks.tables import significant

from kalm_integrations.planning.plans import make_plan
from tools import evaluation_pages
from tools.drawing import arrow, bar, box, picture, text
from tools.paths import DOCS

HOME = DOCS / "index.md"
FIGURES = DOCS / "figures"
TOKENS = 256
"""Of a passage, in the picture and in the table."""

ENCODER, DECODER, QUERY = "encoder", "decoder", "query"
LEGEND = {
    ENCODER: "encoder: reads the passages",
    DECODER: "decoder: reads prompt and query",
    QUERY: "decoder: reads the query alone",
}


class Bar(NamedTuple):
    """A ranking: its name and the seconds of its parts."""

    name: str
    parts: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def bars() -> list[Bar]:
    """Return where the time goes. The encoder's part is what a row takes longer than the one that is given its states."""
    [run] = (run for name, run in json.loads(RESULTS.read_text(encoding="utf-8")).items() if name == "cpu nano")
    results = Results(run)

    def seconds(name: str) -> float:
        row = results.find(name, passage_tokens=TOKENS)
        assert row is not None, f"{RESULTS} has no row {name!r}"
        return row.seconds

    reference, pooled = seconds(plan.REFERENCE_POOLED), seconds(plan.OURS_POOLED)
    return [
        Bar("The reference (mteb)", {ENCODER: seconds(plan.REFERENCE_COLD) - reference, DECODER: reference}),
        Bar("This package, nothing stored", {ENCODER: seconds(plan.OURS_COLD) - pooled, DECODER: pooled}),
        Bar("Encodings stored", {DECODER: pooled}),
        Bar("Encodings stored, prefix states in memory", {QUERY: seconds(plan.OURS_PREFIX)}),
    ]


def time() -> str:
    """Return the picture of where the time goes."""
    drawn = bars()
    left, width = 20, 520
    scale = (width - 2 * left - 60) / max(each.seconds for each in drawn)
    parts = [
        text(left, 32, "Seconds to rank 100 passages for one query", 17, weight=600),
        text(left, 53, f"{TOKENS} tokens each, Nano's shape, float32, two CPU cores", 13, "quiet"),
    ]
    y = 84
    for each in drawn:
        parts.append(text(left, y, each.name, 14))
        x = float(left)
        for kind, seconds in each.parts.items():
            parts.append(bar(x, y + 7, max(scale * seconds, 2), 20, kind))
            x += scale * seconds
        parts.append(text(x + 8, y + 22, significant(each.seconds), 15, weight=600))
        y += 52
    for kind, words in LEGEND.items():
        parts += [bar(left, y - 7, 14, 14, kind), text(left + 22, y + 5, words, 13, "quiet")]
        y += 22
    said = ", ".join(f"{each.name} {significant(each.seconds)}" for each in drawn)
    return picture(width, y + 2, f"Seconds to rank 100 passages of {TOKENS} tokens: {said}.", parts)


def flow() -> str:
    """Return the drawing of how it works, from ingest to query."""
    width, left, third = 520, 20, 148
    columns = [left + (third + 18) * place for place in range(3)]
    middle = [x + third / 2 for x in columns]
    whole = width - 2 * left
    parts = [
        text(left, 34, "At ingest: once per passage", 16, weight=600),
        box(columns[0], 50, third, 74, ["passage", "after splitting"]),
        arrow((columns[0] + third, 87), (columns[1], 87)),
        box(columns[1], 50, third, 74, ["encoder", "one state per", "token"]),
        arrow((columns[1] + third, 87), (columns[2], 87)),
        box(columns[2], 50, third, 74, ["encoding", "mean of 4 states,", "codec rot4"]),
        arrow((middle[2], 124), (middle[2], 158)),
        box(left, 158, whole, 62, ["your store", 'text, vector, metadata["kalm_encoding"]'], "store"),
        text(left, 258, "At query time: once per candidate", 16, weight=600),
        arrow((middle[2], 220), (middle[2], 276)),
        box(columns[0], 276, third, 74, ["query", "and instruction"]),
        box(columns[2], 276, third, 74, ["candidates", "of the first stage,", "with encodings"]),
        arrow((columns[0] + third, 313), (middle[1] - 22, 313), (middle[1] - 22, 386)),
        arrow((columns[2], 313), (middle[1] + 22, 313), (middle[1] + 22, 386)),
        box(columns[0], 386, third, 74, ["prefix states", "in memory, of", "passages met before"]),
        arrow((columns[0] + third, 423), (columns[1], 423)),
        box(columns[1], 386, third, 74, ["decoder", "reads the query,", "attends to states"]),
        arrow((columns[1] + third, 423), (columns[2], 423)),
        box(columns[2], 386, third, 74, ["score", "P(yes), and its", "margin"]),
    ]
    said = (
        "At ingest the encoder reads each passage once, and the pooled states are stored as a string in its metadata. "
        "At query time the store returns candidates with their encodings; the decoder alone reads the query and scores them."
    )
    return picture(width, 480, said, parts)


PICTURES: dict[str, Callable[[], str]] = {"time": time, "flow": flow}


def checkpoints() -> str:
    """Return the table of sizes, seconds and quality."""
    rows = evaluation_pages.read("published.json")["rows"]
    published = {row["system"]: row["values"][0] for row in rows if row["version"] in ("", "v3")}
    first_stage = published["first stage: KaLM-Embedding-V2.5"]
    plans: dict[str, Any] = {name: make_plan(name, 1_000_000, TOKENS, speed=1.0) for name in ("nano", "small", "large")}
    lines: list[tuple[str, Callable[[str], str]]] = [
        ("metadata of a passage, characters", lambda name: f"{plans[name].characters:,}"),
        ("passages encoded an hour and core", lambda name: f"{plans[name].seconds.passages_per_hour_and_core:,.0f}"),
        *(
            (f"query, {kept} kept, s", lambda name, kept=kept: significant(plans[name].seconds.query[kept]))
            for kept in ("nothing", "encodings", "prefix states")
        ),
        (f"nDCG@10 on BEIR-13, first stage {first_stage:.2f}", lambda name: f"{published[name.capitalize()]:.2f}"),
    ]
    head = f"| | {' | '.join(f'`{name}`' for name in plans)} |\n|---|{'--:|' * len(plans)}"
    return "\n".join([head, *(f"| {title} | {' | '.join(map(value, plans))} |" for title, value in lines)])


TABLES: dict[str, Callable[[], str]] = {"checkpoints": checkpoints}


def updated_home() -> str:
    """Return the home page with its table as the figures make it."""
    return evaluation_pages.filled(HOME, "tools.pictures", TABLES)


if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (FIGURES / f"{name}.svg").write_text(draw(), encoding="utf-8")
    HOME.write_text(updated_home(), encoding="utf-8")
