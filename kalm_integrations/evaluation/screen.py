"""A coarse-to-fine screen: all candidates at a coarse ratio, the best of them again at a fine one. Does it pay?"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from statistics import fmean, median
from typing import Any

import torch

from kalm_integrations.core.passages.encoding import EncodedPassage
from kalm_integrations.core.reranker import KalmReranker
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.errors import SettingsError
from kalm_integrations.evaluation.candidates import (
    BM25_NAME,
    encode_candidates,
    find_candidates,
    order,
    score_candidates,
)
from kalm_integrations.evaluation.metrics import bootstrap_interval, ndcg_at_10
from kalm_integrations.evaluation.report import Difference

N_BEST = 10
"""The fine ranking's best, which a screen must keep."""


@dataclass(frozen=True)
class ScreenQuality:
    """What a screen does to the fine ranking of one collection."""

    collection: str
    n_queries: int
    top_k: int
    """Candidates per query."""
    coarse_ratio: int
    fine_ratio: int
    n_kept: int
    """Candidates that the screen keeps."""
    recall: float
    """Share of the fine ranking's ten best that the screen keeps, mean over queries."""
    best_kept: float
    """Share of queries whose best candidate by the fine ranking the screen keeps."""
    fine_ndcg: float
    """nDCG@10 of the fine ranking of all candidates."""
    difference: Difference
    """How much more nDCG@10 the screened ranking has."""


@dataclass(frozen=True)
class ScreenTime:
    """Seconds for one query's candidates at one passage length: medians of interleaved rounds."""

    n_tokens: int
    fine_seconds: float
    """All candidates at the fine ratio."""
    screened_seconds: float
    """All at the coarse ratio, and those that are kept at the fine one."""


@dataclass(frozen=True)
class ScreenReport:
    """Quality by collection and time by passage length."""

    model: str
    n_candidates: int
    """Of a timed query."""
    coarse_ratio: int
    fine_ratio: int
    n_kept: int
    qualities: tuple[ScreenQuality, ...]
    times: tuple[ScreenTime, ...]
    crossover_tokens: int | None
    """Passage length from which the screen is faster; None if it is at no length that was measured."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


def measure_quality(
    reranker: KalmReranker,
    collection: Collection,
    *,
    coarse_ratio: int = 32,
    fine_ratio: int = 4,
    n_kept: int = 20,
    first_stage: str = BM25_NAME,
    top_k: int = 100,
    n_queries: int | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> ScreenQuality:
    """Compare the screened ranking of a first stage's candidates with the fine ranking of all of them.

    Args:
        reranker: its `compression_ratio` must divide `fine_ratio`.
        collection: what to search in.
        coarse_ratio: of the screen; a multiple of `fine_ratio`.
        fine_ratio: of the final ranking.
        n_kept: how many candidates the screen keeps.
        first_stage: where the candidates come from; see `find_candidates`.
        top_k: candidates per query.
        n_queries: how many queries to draw; None takes all.
        seed: of that draw, and of the bootstrap.
        show_progress: draw a progress bar for encoding.

    Raises:
        SettingsError: an argument is out of range.
        MissingExtraError: the extra `eval` is not installed.
    """
    _check(coarse_ratio, fine_ratio, n_kept, top_k)
    candidates = find_candidates(collection, first_stage, top_k, n_queries, seed)
    encoded = encode_candidates(reranker, collection, candidates, show_progress)
    by_ratio = {}
    for ratio in (fine_ratio, coarse_ratio):
        pooled = {i: encoding.pool(ratio) for i, encoding in encoded.items()}
        by_ratio[ratio] = score_candidates(reranker, candidates, pooled)
    fine = {q: order(found.ids, by_ratio[fine_ratio][q]) for q, found in candidates.items()}
    coarse = {q: order(found.ids, by_ratio[coarse_ratio][q]) for q, found in candidates.items()}
    screened = {}
    for query_id, ids in fine.items():
        kept = set(coarse[query_id][:n_kept])
        rest = coarse[query_id][n_kept:]
        screened[query_id] = [i for i in ids if i in kept] + rest
    kept_best = {q: [i in set(coarse[q][:n_kept]) for i in ids[:N_BEST]] for q, ids in fine.items()}
    values = [ndcg_at_10(collection.qrels, rankings) for rankings in (fine, screened)]
    gains = [values[1][q] - values[0][q] for q in fine]
    return ScreenQuality(
        collection=collection.name,
        n_queries=len(candidates),
        top_k=top_k,
        coarse_ratio=coarse_ratio,
        fine_ratio=fine_ratio,
        n_kept=n_kept,
        recall=fmean(fmean(kept) for kept in kept_best.values()),
        best_kept=fmean(kept[0] for kept in kept_best.values()),
        fine_ndcg=fmean(values[0].values()),
        difference=Difference(fmean(gains), *bootstrap_interval(gains, seed)),
    )


def measure_times(
    reranker: KalmReranker,
    *,
    lengths: Sequence[int],
    coarse_ratio: int = 32,
    fine_ratio: int = 4,
    n_kept: int = 20,
    n_candidates: int = 100,
    query: str = "which of these passages answers the question?",
    rounds: int = 3,
    seed: int = 0,
) -> tuple[ScreenTime, ...]:
    """Time one query with and without the screen, by passage length.

    The passages are random states: how long scoring takes depends on their number only, and so no passage has to be encoded,
    however long. Every round makes new ones, so that nothing that a reranker keeps of a passage shortens a later round, and
    both ways get their states pooled.

    Args:
        reranker: scores; only its decoder is used.
        lengths: passage lengths in tokens.
        coarse_ratio: of the screen; a multiple of `fine_ratio`.
        fine_ratio: of the final ranking.
        n_kept: how many candidates the screen keeps.
        n_candidates: candidates of the query.
        query: the query.
        rounds: interleaved rounds.
        seed: of the states.

    Raises:
        SettingsError: an argument is out of range.
    """
    _check(coarse_ratio, fine_ratio, n_kept, n_candidates)
    if not lengths or min(lengths) < 1 or rounds < 1:
        msg = f"lengths and rounds must be positive and one at least, but got {list(lengths)} and {rounds}"
        raise SettingsError(msg)
    fingerprint, width = reranker.fingerprint, reranker.runtime.checkpoint.encoder_config.hidden_width
    generator = torch.Generator().manual_seed(seed)
    # Passages that a reranker keeps something of must not be mistaken for each other.
    hashes = (f"{number:032x}" for number in count())

    def make(n_tokens: int) -> list[EncodedPassage]:
        shape = (-(-n_tokens // fine_ratio), width)
        states = [torch.randn(shape, generator=generator) for _ in range(n_candidates)]
        return [EncodedPassage(s, n_tokens, fine_ratio, fingerprint, next(hashes), "fp32") for s in states]

    def score_fine(passages: list[EncodedPassage]) -> None:
        reranker.score(query, passages)

    def score_screened(passages: list[EncodedPassage]) -> None:
        coarse = reranker.rank(query, [p.pool(coarse_ratio) for p in passages], n_kept)
        reranker.score(query, [passages[ranked.index] for ranked in coarse])

    taken: dict[tuple[int, str], list[float]] = {(n, way): [] for n in lengths for way in ("fine", "screened")}
    # One round more than is counted: the first loads and warms up.
    for is_counted in (False, *[True] * rounds):
        for n_tokens in lengths:
            for way, score in (("fine", score_fine), ("screened", score_screened)):
                passages = make(n_tokens)
                started = time.perf_counter()
                score(passages)
                if is_counted:
                    taken[n_tokens, way].append(time.perf_counter() - started)
    return tuple(ScreenTime(n, median(taken[n, "fine"]), median(taken[n, "screened"])) for n in sorted(lengths))


def find_crossover(times: Sequence[ScreenTime]) -> int | None:
    """Return the passage length from which on the screen is faster, between two measured lengths by a straight line.

    Args:
        times: by rising length.

    Returns:
        None if the screen is not faster at the longest passages.
    """
    crossover: float | None = None
    for shorter, longer in zip((None, *times), times, strict=False):
        gain = longer.fine_seconds - longer.screened_seconds
        if gain <= 0:
            crossover = None
        elif crossover is None:
            before = 0.0 if shorter is None else shorter.screened_seconds - shorter.fine_seconds
            start = longer.n_tokens if shorter is None else shorter.n_tokens
            crossover = start + (longer.n_tokens - start) * before / (before + gain)
    return None if crossover is None else round(crossover)


def to_markdown(report: Mapping[str, Any]) -> str:
    """Return the tables of `ScreenReport.to_dict` as Markdown."""
    coarse, fine, kept = report["coarse_ratio"], report["fine_ratio"], report["n_kept"]
    parts = []
    if report["qualities"]:
        parts.append(f"| collection | queries | candidates | recall@{kept} | best kept | nDCG@10, all at {fine} | screened |")
        parts.append("|---|--:|--:|--:|--:|--:|---|")
        for q in report["qualities"]:
            d = q["difference"]
            gain = f"{d['mean']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})"
            numbers = f"{q['recall']:.3f} | {q['best_kept']:.3f} | {q['fine_ndcg']:.3f} | {gain}"
            parts.append(f"| {q['collection']} | {q['n_queries']:,} | {q['top_k']} | {numbers} |")
        parts.append("")
    parts.append(f"| tokens | {report['n_candidates']} at {fine}: s | all at {coarse}, {kept} at {fine}: s | saved |")
    parts.append("|--:|--:|--:|--:|")
    for t in report["times"]:
        saved = 1 - t["screened_seconds"] / t["fine_seconds"]
        parts.append(f"| {t['n_tokens']:,} | {t['fine_seconds']:.2f} | {t['screened_seconds']:.2f} | {saved:+.0%} |")
    crossover = report["crossover_tokens"]
    longest = max(t["n_tokens"] for t in report["times"])
    where = f"from about {crossover:,} tokens on" if crossover is not None else f"at no length up to {longest:,} tokens"
    parts.append(f"\nWith `{report['model']}` the screen is faster {where}.\n")
    return "\n".join(parts)


def _check(coarse_ratio: int, fine_ratio: int, n_kept: int, n_candidates: int) -> None:
    if fine_ratio < 1 or coarse_ratio <= fine_ratio or coarse_ratio % fine_ratio:
        msg = f"the coarse ratio must be a larger multiple of the fine one, but got {coarse_ratio} and {fine_ratio}"
        raise SettingsError(msg)
    if not 1 <= n_kept < n_candidates:
        msg = f"a screen must keep fewer of the {n_candidates} candidates than all, and one at least, but got {n_kept}"
        raise SettingsError(msg)
