"""`python -m benchmarks.long_passages FOLDER`: cut, windows, or one long pass, by the place of the answer.

FOLDER is what `tools.long_articles` made. Each question's candidates are BM25's best passages, its own always among them, and
every way orders the same ones. Intervals are paired bootstraps over questions. Seconds are those that one thread computes, and
of the clock on a GPU. The ways take turns at each passage and each question, so that other work falls on all of them alike.
"""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from benchmarks import machine, trials
from benchmarks.rows import progress
from kalm_integrations import KalmReranker, Passage
from kalm_integrations.core.text import Range
from kalm_integrations.core.types import ENCODING_KEY
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.bm25 import BM25
from kalm_integrations.corpora.measures import measure
from kalm_integrations.evaluation.differences import mean_differences

FIRST_STAGE, CUT, WINDOWS, HALF, WHOLE = "BM25", "cut", "windows", "one pass, 4,096", "one pass, 8,192"
WAYS: dict[str, dict[str, Any]] = {
    CUT: {"long_passages": "cut"},
    WINDOWS: {"long_passages": "windows"},
    HALF: {"long_passages": "cut", "max_passage_tokens": 4096},
    WHOLE: {"long_passages": "cut", "max_passage_tokens": 8192},
}
COMPARED = ((WINDOWS, CUT), (HALF, CUT), (WHOLE, CUT), (WINDOWS, HALF), (WINDOWS, WHOLE))
"""Ways whose differences are measured: of the first to the second."""
THIRDS = ("early third", "middle third", "late third")
REACHES = {"first 1,024 tokens": 1024, "1,024 to 4,095": 4096, "4,096 and later": 8192}
"""Groups of questions by the token in which the answer begins, with the token behind the group."""
ALL = "all"
NDCG, TOP = "nDCG@10", "P@1"
WARM, SLOW = "prefix states in memory", "stored encodings"
"""What a query finds."""
CACHE_BYTES = 4 * 2**30
"""Room for the encodings of all passages, and for their prefix states."""
SLOW_QUESTIONS = 40
"""Questions that are asked without prefix states."""


@dataclass(frozen=True)
class Question:
    """A question about a long passage."""

    id: str
    text: str
    passage: str
    answers: tuple[Range, ...]
    token: int
    """In which the first answer begins."""
    n_tokens: int
    """Of the passage."""

    @property
    def groups(self) -> tuple[str, str, str]:
        """The groups that the question counts in."""
        reach = next(name for name, behind in REACHES.items() if self.token < behind)
        return ALL, THIRDS[3 * self.token // self.n_tokens], reach


def read_questions(folder: Path, queries: Mapping[str, str]) -> list[Question]:
    """Return the questions of a collection of long passages."""
    with (folder / "answers.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [
        Question(
            row["_id"],
            queries[row["_id"]],
            row["passage"],
            tuple((start, end) for start, end in row["answers"]),
            row["token"],
            row["tokens"],
        )
        for row in rows
    ]


def sample(questions: Sequence[Question], n: int) -> list[Question]:
    """Return as many questions of each third, the same ones every time, in random order."""
    draw = random.Random(0)
    of_third = {third: [one for one in questions if third in one.groups] for third in THIRDS}
    drawn = [one for found in of_third.values() for one in draw.sample(found, min(n // len(THIRDS), len(found)))]
    draw.shuffle(drawn)
    return drawn


def find_candidates(collection: Collection, questions: Sequence[Question], top_k: int) -> tuple[dict[str, list[str]], float]:
    """Return BM25's best for each question, its own passage in the last place if it is not among them; and the share it is."""
    ids = list(collection.passages)
    found = BM25(list(collection.passages.values())).search([one.text for one in questions], top_k)
    candidates, n_found = {}, 0
    for one, (indices, _) in zip(questions, found, strict=True):
        best = [ids[index] for index in indices]
        n_found += one.passage in best
        candidates[one.id] = best if one.passage in best else [*best[:-1], one.passage]
    return candidates, n_found / len(questions)


@dataclass
class Way:
    """A way to read long passages, and what was measured of it."""

    reranker: KalmReranker
    """Keeps encodings and prefix states in memory."""
    slow: KalmReranker
    """Keeps encodings only."""
    passages: dict[str, Passage] = field(default_factory=dict)
    n_bytes: list[int] = field(default_factory=list)
    """Of each passage's metadata string."""
    encode: list[float] = field(default_factory=list)
    """Seconds for each passage."""
    ask: dict[str, list[float]] = field(default_factory=lambda: {WARM: [], SLOW: []})
    """Seconds for each query, by what it finds."""
    rankings: dict[str, list[str]] = field(default_factory=dict)
    """Ids of passages, best first, by question."""
    hits: list[bool] = field(default_factory=list)
    """Whether the best window of each question's own passage holds an answer."""

    @classmethod
    def open(cls, model: str, device: str, settings: Mapping[str, Any]) -> Way:
        """Open the rerankers of a way."""
        settings = {**settings, "device": device, "cache_bytes": CACHE_BYTES}
        reranker, slow = (
            KalmReranker.from_pretrained(model, **settings, prefix_cache_bytes=n_bytes) for n_bytes in (CACHE_BYTES, 0)
        )
        return cls(reranker, slow)


def encode(ways: Mapping[str, Way], passages: Mapping[str, str], now: Callable[[], float]) -> None:
    """Encode every passage in every way, by a clock in seconds."""
    # Touches what is loaded late.
    for way in ways.values():
        way.slow.encode_to_metadata(["Otters live on fish."])
    for done, (key, text) in enumerate(passages.items(), 1):
        for way in ways.values():
            started = now()
            [made] = way.slow.encode_to_metadata([text])
            way.encode.append(now() - started)
            way.n_bytes.append(len(made[ENCODING_KEY]))
            way.passages[key] = Passage(text, made[ENCODING_KEY])
        if not done % 10:
            progress(f"{done} of {len(passages)} passages encoded")
    for way in ways.values():
        way.reranker.prepare(list(way.passages.values()))


def ask(
    ways: Mapping[str, Way],
    questions: Sequence[Question],
    candidates: Mapping[str, Sequence[str]],
    now: Callable[[], float],
) -> None:
    """Ask every question in every way, by a clock in seconds."""
    for done, one in enumerate(questions, 1):
        ids = candidates[one.id]
        for name, way in ways.items():
            passages = [way.passages[key] for key in ids]
            started = now()
            ranking = way.reranker.rank(one.text, passages)
            way.ask[WARM].append(now() - started)
            way.rankings[one.id] = [ids[ranked.index] for ranked in ranking]
            if name == WINDOWS:
                [own] = [ranked for ranked in ranking if ids[ranked.index] == one.passage]
                assert own.window is not None, "a long passage must be read in windows"
                way.hits.append(holds_answer(own.window, one.answers))
            if done <= SLOW_QUESTIONS:
                started = now()
                way.slow.rank(one.text, passages)
                way.ask[SLOW].append(now() - started)
        if not done % 100:
            progress(f"{done} of {len(questions)} questions asked")


def holds_answer(window: Range, answers: Sequence[Range]) -> bool:
    """Return whether a window holds an answer whole."""
    return any(window[0] <= start and end <= window[1] for start, end in answers)


def by_group(questions: Sequence[Question], rankings: Mapping[str, Mapping[str, Sequence[str]]]) -> dict[str, dict[str, Any]]:
    """Return what each way's orders are worth in each group of questions, and how far those of `COMPARED` differ.

    Args:
        questions: those that were asked.
        rankings: ids of passages by question, by way.
    """
    qrels = {one.id: {one.passage: 1} for one in questions}
    values = {name: measure(qrels, found, [NDCG, TOP]) for name, found in rankings.items()}
    groups: dict[str, list[str]] = defaultdict(list)
    for one in questions:
        for group in one.groups:
            groups[group].append(one.id)
    rows: dict[str, dict[str, Any]] = {}
    for group in (name for name in (ALL, *THIRDS, *REACHES) if name in groups):
        ids = groups[group]
        means = {way: {name: fmean(of[one] for one in ids) for name, of in found.items()} for way, found in values.items()}
        pairs = [[values[way][NDCG][one] - values[base][NDCG][one] for one in ids] for way, base in COMPARED]
        rows[group] = {"questions": len(ids), "ways": means, "differences": list(map(asdict, mean_differences(pairs)))}
    return rows


def costs(ways: Mapping[str, Way]) -> dict[str, dict[str, float]]:
    """Return bytes and seconds of each way: means over passages, medians over questions."""
    return {
        name: {
            "bytes": fmean(way.n_bytes),
            "encode": fmean(way.encode),
            **{kind: median(seconds) for kind, seconds in way.ask.items()},
        }
        for name, way in ways.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = trials.parser("long_passages", __doc__)
    parser.add_argument("folder", type=Path, help="what tools.long_articles made")
    parser.add_argument("--questions", type=int, default=600, help="a third of them with answers in each third of the passage")
    parser.add_argument("--top-k", type=int, default=20, help="candidates of a question")
    parser.add_argument("--model", default="pico")
    parser.add_argument("--device", default="cpu")
    options = trials.parse(parser, arguments)
    torch.set_num_threads(1)
    collection = Collection.read(options.folder)
    questions = sample(read_questions(options.folder, collection.queries), options.questions)
    candidates, recall = find_candidates(collection, questions, options.top_k)
    facts = machine.describe(options.device)
    ways = {name: Way.open(options.model, options.device, settings) for name, settings in WAYS.items()}
    # What a GPU does takes no seconds of the CPU. Metadata and rankings are complete only when it has done it.
    now = time.process_time if options.device == "cpu" else time.perf_counter
    encode(ways, collection.passages, now)
    ask(ways, questions, candidates, now)
    rankings = {FIRST_STAGE: candidates, **{name: way.rankings for name, way in ways.items()}}
    measured = {
        "machine": facts,
        "model": options.model,
        "passages": len(collection.passages),
        "tokens": fmean({one.passage: one.n_tokens for one in questions}.values()),
        "candidates": options.top_k,
        "recall": recall,
        "groups": by_group(questions, rankings),
        "window_hits": fmean(ways[WINDOWS].hits),
        "costs": costs(ways),
    }
    trials.write(options.output, measured)


if __name__ == "__main__":
    main()
