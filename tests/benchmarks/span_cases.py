"""Questions about a passage of which the sentences that answer are known."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kalm_integrations.core.text import Range

LONGEST_DOCUMENT = 3000
"""Characters of a document that is joined of sections: no token of it may lie behind `max_passage_tokens`."""

FEWEST_SECTIONS = 3


@dataclass(frozen=True)
class Case:
    """A question, a passage, and where its answers lie."""

    question: str
    text: str
    answers: tuple[Range, ...]

    def is_answer(self, start: int, end: int) -> bool:
        """Return whether a part of the text holds an answer whole, or lies in one."""
        return any((start <= a and b <= end) or (a <= start and end <= b) for a, b in self.answers)


def answered(folder: Path) -> list[Case]:
    """Return the questions of a collection with `answers.jsonl`: an answer is a few words."""
    passages, queries = (_texts(folder / f"{name}.jsonl") for name in ("corpus", "queries"))
    return [
        Case(queries[row["_id"]], passages[row["passage"]], tuple((start, end) for start, end in row["answers"]))
        for row in _rows(folder / "answers.jsonl")
    ]


def joined(folder: Path) -> list[Case]:
    """Return the questions about documents of which a section answers: passages of one title, joined in random order."""
    rows = {row["_id"]: row for row in _rows(folder / "corpus.jsonl")}
    queries = _texts(folder / "queries.jsonl")
    of_query: dict[str, list[str]] = defaultdict(list)
    for line in (folder / "qrels" / "train.tsv").read_text().splitlines()[1:]:
        query, passage, _ = line.split("\t")
        of_query[query].append(passage)
    by_title: dict[str, dict[str, str]] = defaultdict(dict)
    for query, found in of_query.items():
        if len(found) == 1:
            row = rows[found[0]]
            by_title[row["title"]].setdefault(row["text"], query)
    shuffle = random.Random(0).shuffle
    cases = []
    for sections in by_title.values():
        texts = list(sections)
        shuffle(texts)
        while sum(map(len, texts)) + 2 * len(texts) > LONGEST_DOCUMENT:
            texts.remove(max(texts, key=len))
        if len(texts) < FEWEST_SECTIONS:
            continue
        document, start = "\n\n".join(texts), 0
        for text in texts:
            cases.append(Case(queries[sections[text]], document, ((start, start + len(text)),)))
            start += len(text) + 2
    return cases


def sample(cases: list[Case], n: int) -> list[Case]:
    """Return some cases, the same ones every time."""
    return random.Random(0).sample(cases, min(n, len(cases)))


def _texts(path: Path) -> dict[str, str]:
    return {row["_id"]: row["text"] for row in _rows(path)}


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open() as lines:
        yield from map(json.loads, lines)
