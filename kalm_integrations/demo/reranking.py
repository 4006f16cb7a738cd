"""First part of the demo: BM25 finds candidates, the reranker puts the best first."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from kalm_integrations.core.ranking import fuse
from kalm_integrations.core.reranker import KalmReranker
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.bm25 import BM25
from kalm_integrations.corpora.measures import ndcg_at_10
from kalm_integrations.demo.layout import columns, heading, plain, seconds, shortened
from kalm_integrations.demo.stage import N_CANDIDATES

N_RANDOM, SEED = 100, 0


@dataclass(frozen=True)
class _Question:
    """A question with its candidates, by id."""

    id: str
    text: str
    answer: str
    """The paragraph that answers it."""
    before: list[str]
    """Best first, as BM25 found them."""
    scores: list[float]
    """BM25's scores of them."""

    @property
    def is_missed(self) -> bool:
        """Return whether BM25 does not put the answer first."""
        return self.before[0] != self.answer


@dataclass(frozen=True)
class _Answered:
    """A question with its candidates in new orders."""

    question: _Question
    after: list[str]
    """Best first by the reranker."""
    summed: list[str]
    """Best first by the sum of the reranker's and BM25's scores."""

    @property
    def gain(self) -> int:
        """Return by how many places the answer rose; 0 where BM25 did not find it."""
        if self.question.answer not in self.after:
            return 0
        return self.question.before.index(self.question.answer) - self.after.index(self.question.answer)


def show_reranking(reranker: KalmReranker, model: str, folder: Path, console: Console) -> None:
    """Rerank the candidates of sample questions, and print what that changes and what it costs.

    Args:
        reranker: with empty caches.
        model: its name.
        folder: of the sample, in BEIR's layout.
        console: where to print.
    """
    sample = Collection.read(folder)
    heading(console, "KaLM reranker: find candidates with BM25, put the best first")
    size = f"{len(sample.passages)} paragraphs of Wikipedia, {len(sample.queries):,} questions"
    plain(console, f"Sample: {size} (XQuAD, CC BY-SA 4.0)")
    plain(console, f"Model:  {model}{' (tiny, for trying out; not for production)' if model == 'pico' else ''}")
    started = time.perf_counter()
    reranker.warm_up()
    plain(console, f"Loaded in {seconds(time.perf_counter() - started)}.")
    questions = _find_candidates(sample)
    drawn = random.Random(SEED).sample(questions, min(N_RANDOM, len(questions)))
    missed = [question for question in questions if question.is_missed]
    _show_times(reranker, sample, drawn[0], console)
    asked = list({question.id: question for question in (*drawn, *missed)}.values())
    bar = track(asked, "Reranking", console=console, transient=True, disable=not console.is_terminal)
    answered = {question.id: _rerank(reranker, sample, question) for question in bar}
    sets = {"random": [answered[q.id] for q in drawn], "BM25 misses": [answered[q.id] for q in missed]}
    heading(console, "2. Before and after")
    plain(
        console,
        f"Asked: {len(drawn)} random questions, and the {len(missed)} of {len(questions):,} whose answer BM25 does not put "
        "first. Here the answer, marked *, moved furthest up and down:",
    )
    _show_changes(sample, list(answered.values()), console)
    _show_quality(sample, sets, console)
    _show_work(reranker, console)


def _find_candidates(sample: Collection) -> list[_Question]:
    """Let BM25 find the candidates of every question."""
    ids = list(sample.passages)
    found = BM25(list(sample.passages.values())).search(list(sample.queries.values()), min(N_CANDIDATES, len(ids)))
    return [
        _Question(question_id, text, next(iter(sample.qrels[question_id])), [ids[i] for i in indices], scores)
        for (question_id, text), (indices, scores) in zip(sample.queries.items(), found, strict=True)
    ]


def _rerank(reranker: KalmReranker, sample: Collection, question: _Question) -> _Answered:
    ranked = reranker.rank(question.text, [sample.passages[i] for i in question.before])
    margins = [passage.margin for passage in sorted(ranked, key=lambda passage: passage.index)]
    sums = fuse(margins, question.scores, "z_score")
    by_sum = sorted(range(len(sums)), key=lambda i: -sums[i])
    after = [question.before[passage.index] for passage in ranked]
    return _Answered(question, after, [question.before[i] for i in by_sum])


def _show_times(reranker: KalmReranker, sample: Collection, question: _Question, console: Console) -> None:
    heading(console, "1. A passage is encoded once")
    table = columns("", "encoded now", "reused", "time")
    for name in ("first query", "the same query again"):
        before, started = reranker.stats, time.perf_counter()
        reranker.rank(question.text, [sample.passages[i] for i in question.before])
        took, after = time.perf_counter() - started, reranker.stats
        made, reused = after.passages_encoded - before.passages_encoded, after.cache_hits - before.cache_hits
        table.add_row(name, str(made), str(reused), seconds(took))
    console.print(table)
    plain(console, "A query is scored against its candidates. Once they are encoded, only the decoder runs.")


def _show_changes(sample: Collection, answered: Sequence[_Answered], console: Console) -> None:
    by_gain = sorted(answered, key=lambda a: -a.gain)
    shown = [a for a in (*by_gain[:2], by_gain[-1]) if a.gain]
    for a in shown:
        places = [order.index(a.question.answer) + 1 for order in (a.question.before, a.after)]
        console.print()
        console.print(Text(a.question.text, style="bold"))
        plain(console, f"Answer {'rises' if a.gain > 0 else 'falls'} from place {places[0]} to {places[1]}.")
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("", justify="right")
        table.add_column("before: BM25", no_wrap=True, ratio=1)
        table.add_column("after: reranked", no_wrap=True, ratio=1)
        for place in range(3):
            cells = [_passage(sample, order[place], a.question.answer) for order in (a.question.before, a.after)]
            table.add_row(str(place + 1), *cells)
        console.print(table)


def _passage(sample: Collection, passage_id: str, answer: str) -> Text:
    is_answer = passage_id == answer
    text = shortened(f"{'*' if is_answer else ' '} {sample.passages[passage_id]}", 36)
    text.style = "green" if is_answer else ""
    return text


def _show_quality(sample: Collection, sets: dict[str, list[_Answered]], console: Console) -> None:
    heading(console, "3. Quality")
    names = [name for title, answered in sets.items() for name in (f"{len(answered)} {title}:\nnDCG@10", "\nanswer first")]
    table = columns("\norder", *names)
    orders: dict[str, Callable[[_Answered], list[str]]] = {
        "BM25": lambda a: a.question.before,
        "reranked": lambda a: a.after,
        "reranked + BM25": lambda a: a.summed,
    }
    for name, order in orders.items():
        cells = []
        for answered in sets.values():
            values = ndcg_at_10(sample.qrels, {a.question.id: order(a) for a in answered}).values()
            n_first = sum(order(a)[0] == a.question.answer for a in answered)
            cells += [f"{fmean(values):.3f}" if values else "-", str(n_first)]
        table.add_row(name, *cells)
    console.print(table)
    plain(
        console,
        "nDCG@10 is 1 where every answer comes first. '+ BM25' sorts by the sum of both scores, each scaled per question. "
        "In so small a sample BM25 misses little, and where it does it can only be beaten: look at both sets.",
    )


def _show_work(reranker: KalmReranker, console: Console) -> None:
    heading(console, "4. Work done and work saved")
    stats = reranker.stats
    table = columns("", "passages", "time")
    table.add_row("encodings made", f"{stats.passages_encoded:,}", seconds(stats.encode_seconds))
    table.add_row("encodings reused", f"{stats.cache_hits:,}", "")
    table.add_row("scored", f"{stats.passages_scored:,}", seconds(stats.score_seconds))
    console.print(table)
    per_query = stats.score_seconds * N_CANDIDATES / stats.passages_scored
    plain(console, f"With all encodings made, a query takes {seconds(per_query)} on average.")
