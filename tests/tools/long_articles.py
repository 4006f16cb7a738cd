"""Joins the paragraphs of a collection's articles to long passages, in which the place of every answer is known.

`python -m tools.long_articles SQUAD_DEV FOLDER`, from tests/, takes a BEIR folder with `answers.jsonl` whose passages have the
titles of their articles, and writes another. Its passages are paragraphs of one article, in the article's order, with blank
lines between them and without the title: 2,000 to 8,000 tokens of `pico`'s tokenizer. A question is still judged by the
paragraph that it was asked of.
"""

from __future__ import annotations

import json
import random
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from kalm_integrations import KalmReranker
from kalm_integrations.core.checkpoint.prompts import passage_text
from kalm_integrations.core.text import Range
from kalm_integrations.core.windowing import passage_offsets
from kalm_integrations.corpora.beir import Collection
from tools.corpora import write_collection

MODEL = "pico"
FEWEST_TOKENS, MOST_TOKENS = 2000, 8000
BETWEEN = "\n\n"

Tokens = Callable[[str], list[Range]]
"""Returns where the tokens of a passage's text, as the encoder reads it, begin and end."""


class Joined(NamedTuple):
    """A long passage."""

    text: str
    starts: dict[str, int]
    """Where each of its paragraphs begins, by id, in code points."""


def divide(lengths: Sequence[int], draw: random.Random) -> tuple[list[Range], int]:
    """Divide an article into passages whose lengths spread evenly.

    Args:
        lengths: of its paragraphs, in tokens.
        draw: gives every passage the length that it may reach.

    Returns:
        The first paragraph of each passage and the one behind its last, and how many paragraphs at the end are left out,
        because they are too short together, and too long for the passage before them.
    """
    found: list[Range] = []
    start = 0
    while start < len(lengths):
        stop, total, longest = start, 0, draw.randint(FEWEST_TOKENS, MOST_TOKENS)
        while stop < len(lengths) and (total < FEWEST_TOKENS or total + lengths[stop] <= longest):
            total += lengths[stop]
            stop += 1
        if total >= FEWEST_TOKENS:
            found.append((start, stop))
        elif found and sum(lengths[found[-1][0] :]) <= MOST_TOKENS:
            found[-1] = (found[-1][0], stop)
        else:
            return found, stop - start
        start = stop
    return found, 0


def join(rows: Sequence[Mapping[str, str]], tokens: Tokens) -> tuple[list[Joined], int]:
    """Return the long passages of a collection's paragraphs, and how many paragraphs are in none."""
    draw, n_template = random.Random(0), len(tokens(""))
    passages, n_left_out = [], 0
    for _, found in groupby(rows, key=lambda row: row["title"]):
        article = list(found)
        ranges, n_short = divide([len(tokens(row["text"] + BETWEEN)) - n_template for row in article], draw)
        n_left_out += n_short
        for start, stop in ranges:
            starts, text = {}, ""
            for row in article[start:stop]:
                text += BETWEEN if text else ""
                starts[row["_id"]] = len(text)
                text += row["text"]
            passages.append(Joined(text, starts))
    return passages, n_left_out


def place_answers(
    passages: Mapping[str, Joined], answers: Sequence[Mapping[str, Any]], tokens: Tokens
) -> Iterator[dict[str, Any]]:
    """Yield the rows of `answers.jsonl`: ranges in the long passage, the token in which the first begins, and all tokens."""
    of_paragraph = {paragraph: key for key, passage in passages.items() for paragraph in passage.starts}
    begins = {key: [start for start, _ in tokens(passage.text)] for key, passage in passages.items()}
    for row in answers:
        key = of_paragraph.get(row["passage"])
        if key is not None:
            before = passages[key].starts[row["passage"]]
            ranges = [(before + start, before + end) for start, end in row["answers"]]
            token = bisect_right(begins[key], min(ranges)[0]) - 1
            yield {"_id": row["_id"], "passage": key, "answers": ranges, "token": token, "tokens": len(begins[key])}


def make(source: Path, folder: Path, tokens: Tokens) -> str:
    """Write a collection made of another, and return what it has and what was left out."""
    rows, answers, queries = (_rows(source / f"{name}.jsonl") for name in ("corpus", "answers", "queries"))
    joined, n_left_out = join(rows, tokens)
    passages = {f"long{number}": passage for number, passage in enumerate(joined)}
    placed = list(place_answers(passages, answers, tokens))
    asked = {row["_id"]: row["text"] for row in queries}
    collection = Collection(
        folder.name,
        {key: passage.text for key, passage in passages.items()},
        {row["_id"]: asked[row["_id"]] for row in placed},
        {row["_id"]: {row["passage"]: 1} for row in placed},
    )
    write_collection(collection, folder)
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in placed), encoding="utf-8")
    return (
        f"{len(passages):,} passages, {len(placed):,} questions; left out: {n_left_out:,} paragraphs at the ends of articles, "
        f"{len(answers) - len(placed):,} questions about them"
    )


def tokens_of(model: str) -> Tokens:
    """Return the tokens that a model's encoder reads of a text."""
    tokenizer = KalmReranker.from_pretrained(model).runtime.tokenizer(allow_special_tokens=False)

    def tokens(text: str) -> list[Range]:
        # No text has more tokens than bytes.
        return passage_offsets(tokenizer, text, len(passage_text(text).encode()))

    return tokens


def _rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


if __name__ == "__main__":
    print(make(Path(sys.argv[1]), Path(sys.argv[2]), tokens_of(MODEL)))
