"""`python -m benchmarks.spans`: which sentence answers, and how much of the others can be left out.

A method gives each sentence of a passage a score. Counted are the questions whose best sentence holds the answer, and the
share of the text that goes if a sentence has to come near the best one and 95 % of the questions keep one that answers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, trials
from benchmarks.rows import progress
from benchmarks.span_cases import Case, answered, joined, sample
from kalm_integrations import KalmReranker
from kalm_integrations.core.text import Range
from kalm_integrations.corpora.bm25 import BM25
from kalm_integrations.corpora.peers import score_by_bi_encoder
from kalm_integrations.hosting.pruning import odds

KEPT = 0.95
"""Share of the questions that keep an answer."""
AT_ONCE = 256
"""Questions that are asked together."""

Scores = list[np.ndarray]
"""For each question, of the passage's sentences in order."""


def difference(scores: np.ndarray) -> np.ndarray:
    """Return how far each is from the best one."""
    return scores - scores.max()


def share(scores: np.ndarray) -> np.ndarray:
    """Return what part of the best one each is."""
    return scores / max(scores.max(), 1e-9)


def by_states(reranker: KalmReranker, cases: Sequence[Case]) -> tuple[list[list[Range]], Scores]:
    """Return the sentences of each passage, and the logits of their scores."""
    ranges: list[list[Range]] = []
    scores: Scores = []
    for start in range(0, len(cases), AT_ONCE):
        some = cases[start : start + AT_ONCE]
        rankings = reranker.rank_many([case.question for case in some], [[case.text] for case in some], spans=1)
        for [passage] in rankings:
            found = sorted((span.start, span.end, span.score) for span in passage.spans or ())
            ranges.append([(first, end) for first, end, _ in found])
            scores.append(np.log([max(odds(score), sys.float_info.min) for _, _, score in found]))
        progress(f"{start + len(some)} of {len(cases)} questions")
    return ranges, scores


def outcome(cases: Sequence[Case], ranges: Sequence[Sequence[Range]], scores: Scores, distance: Any) -> dict[str, float]:
    """Return what a method is worth.

    Args:
        cases: the questions.
        ranges: the sentences of each one's passage.
        scores: theirs; higher is better.
        distance: makes of a passage's scores how near each comes to the best one, which gets the highest value.
    """
    near = [distance(row) for row in scores]
    is_answer = [np.array([case.is_answer(*place) for place in row]) for case, row in zip(cases, ranges, strict=True)]
    best = [int(row.argmax()) for row in scores]
    hits = np.array([found[first] for found, first in zip(is_answer, best, strict=True)])
    # What the bar may be for a question to keep an answer; the best sentence is kept in any case.
    bars = np.array([np.inf if hit else row[found].max() for hit, row, found in zip(hits, near, is_answer, strict=True)])
    bar = float(np.sort(bars)[int((1 - KEPT) * len(bars))])
    return {"hit": float(hits.mean()), "bar": bar, "removed": removed(ranges, near, best, bar)}


def removed(ranges: Sequence[Sequence[Range]], near: Scores, best: Sequence[int], bar: float) -> float:
    """Return the share of the sentences' text that a bar removes."""
    total = kept = 0
    for places, row, first in zip(ranges, near, best, strict=True):
        lengths = np.array([end - start for start, end in places])
        stays = row >= bar
        stays[first] = True
        total += int(lengths.sum())
        kept += int(lengths[stays].sum())
    return 1 - kept / total


def measure(name: str, cases: Sequence[Case], options: Any) -> dict[str, Any]:
    """Return the rows of a collection."""
    rows: dict[str, Any] = {}
    for ratio in options.ratios:
        reranker = KalmReranker.from_pretrained(options.model, device=options.device, compression_ratio=ratio)
        ranges, logits = by_states(reranker, cases)
        if not rows:
            cases, ranges, logits = _with_answers(cases, ranges, logits)
            sentences = [[case.text[start:end] for start, end in row] for case, row in zip(cases, ranges, strict=True)]
        rows[f"ratio {ratio}"] = outcome(cases, ranges, logits, difference)
    for method, scores in _peers(cases, sentences, options.bi_encoder).items():
        found = [outcome(cases, ranges, scores, distance) for distance in (difference, share)]
        rows[method] = max(found, key=lambda row: row["removed"])
    n_sentences = sum(map(len, ranges))
    return {"name": name, "questions": len(cases), "sentences": n_sentences / len(cases), "methods": rows}


def _with_answers(cases: Any, ranges: Any, scores: Any) -> tuple[Any, Any, Any]:
    """Leave out questions whose answer lies in no sentence, or whose passage has one sentence only."""
    kept = [
        row
        for row in zip(cases, ranges, scores, strict=True)
        if len(row[1]) > 1 and any(row[0].is_answer(*place) for place in row[1])
    ]
    first, second, third = zip(*kept, strict=True)
    return first, second, third


def _peers(cases: Sequence[Case], sentences: Sequence[Sequence[str]], bi_encoder: str) -> dict[str, Scores]:
    """Return the scores that others give the sentences."""
    flat = [sentence for row in sentences for sentence in row]
    ends = np.cumsum([len(row) for row in sentences])
    index = BM25(flat)
    lexical = [
        np.array(index.scores(case.question, range(end - len(row), end)))
        for case, row, end in zip(cases, sentences, ends, strict=True)
    ]
    pairs = [(case.question, sentence) for case, row in zip(cases, sentences, strict=True) for sentence in row]
    cosines = np.split(np.array(score_by_bi_encoder(bi_encoder, pairs)), ends[:-1])
    generator = np.random.default_rng(0)
    return {
        "BM25": lexical,
        "MiniLM": cosines,
        "first sentence": [-np.arange(len(row), dtype=float) for row in sentences],
        "random": [generator.random(len(row)) for row in sentences],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = trials.parser("spans", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with squad-train, squad-dev and medquad")
    parser.add_argument("--bi-encoder", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--questions", type=int, default=2000, help="of each collection")
    parser.add_argument("--ratios", type=int, nargs="+", default=[4, 1, 16])
    parser.add_argument("--model", default="pico")
    parser.add_argument("--device", default="cpu")
    options = trials.parse(parser, arguments)
    collections = {
        "squad-train": answered(options.data / "squad-train"),
        "squad-dev": answered(options.data / "squad-dev"),
        "medquad": joined(options.data / "medquad"),
    }
    rows = [measure(name, sample(cases, options.questions), options) for name, cases in collections.items()]
    trials.write(options.output, {"machine": machine.describe(options.device), "model": options.model, "rows": rows})


if __name__ == "__main__":
    main()
