"""What a reranker does to the order of a first stage, by compression ratio and codec."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from kalm_integrations.core.encoding import EncodedPassage, check_codec
from kalm_integrations.core.fusion import fuse
from kalm_integrations.core.reranker import KalmReranker
from kalm_integrations.errors import SettingsError
from kalm_integrations.evaluation.beir import Collection
from kalm_integrations.evaluation.first_stage import BM25
from kalm_integrations.evaluation.metrics import bootstrap_interval, kendall_tau, ndcg_at_10

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Measured:
    """nDCG@10 of an order, and its difference to the first stage's order."""

    ndcg: float
    difference: float
    low: float
    """Lower end of the difference's 95 % interval (paired bootstrap over queries)."""
    high: float


@dataclass(frozen=True)
class Setting:
    """Results with the encodings at one ratio and codec."""

    ratio: int
    codec: str
    mean_characters: float
    """Mean length of a passage's metadata string."""
    max_score_change: float
    """Largest change of a score, compared with states in float32 at the same ratio."""
    rank_agreement: float
    """Kendall's tau with the order by states in float32, mean over queries."""
    reranked: Measured
    """The reranker's own order."""
    fused: Measured
    """The order by z-score fusion of the reranker's margin and the first stage's score, at the default weight."""


@dataclass(frozen=True)
class Report:
    """An evaluation on one collection."""

    collection: str
    n_queries: int
    top_k: int
    """Candidates per query."""
    seed: int
    """Of the sample of queries, and of the bootstrap."""
    n_passages: int
    """Different candidates, each encoded once."""
    encode_seconds: float
    score_seconds: float
    first_stage_ndcg: float
    settings: tuple[Setting, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    def to_table(self) -> Table:
        """Return a table for the terminal."""
        from rich.table import Table
        from rich.text import Text

        title = f"{self.collection}: {self.n_queries:,} queries, the {self.top_k} best of BM25 reordered"
        table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
        table.add_column("order")
        for name in ("ratio", "codec", "chars", "max Δp", "tau", "nDCG@10", "to BM25", "95 % interval"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_row("BM25", "", "", "", "", "", f"{self.first_stage_ndcg:.3f}")
        for setting in self.settings:
            size = f"{setting.mean_characters:,.0f}"
            for name, measured in (("reranked", setting.reranked), ("+ BM25", setting.fused)):
                interval = f"{measured.low:+.3f}…{measured.high:+.3f}"
                change = (f"{setting.max_score_change:.0e}", f"{setting.rank_agreement:.3f}")
                numbers = (*change, f"{measured.ndcg:.3f}", f"{measured.difference:+.3f}", interval)
                table.add_row(name, str(setting.ratio), setting.codec, size, *numbers)
        return table


@dataclass(frozen=True)
class _Candidates:
    """A query's candidates in the first stage's order."""

    query: str
    ids: list[str]
    scores: list[float]


def evaluate(
    reranker: KalmReranker,
    collection: Collection,
    *,
    ratios: Sequence[int],
    codecs: Sequence[str],
    top_k: int = 20,
    n_queries: int | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> Report:
    """Rerank BM25's candidates at every ratio and codec.

    Each different candidate is encoded once, at the reranker's own ratio, and kept in float32; coarser ratios are pooled
    from that, and every encoding makes the round trip through its metadata string before it is scored.

    Args:
        reranker: its `compression_ratio` must divide all `ratios`.
        collection: what to search in. A passage with the id of the query is no candidate, as in BEIR.
        ratios: compression ratios to compare.
        codecs: storage codecs to compare.
        top_k: candidates per query.
        n_queries: how many queries to draw; None, or as many as there are, takes all.
        seed: of that draw, and of the bootstrap.
        show_progress: draw progress bars.

    Raises:
        SettingsError: an argument is out of range, or the collection has no passages or no judged queries.
        MissingExtraError: the extra `eval` is not installed.
    """
    _check(reranker, ratios, codecs, top_k, n_queries)
    candidates = _search(collection, top_k, n_queries, seed)
    baseline = ndcg_at_10(collection.qrels, {query_id: found.ids for query_id, found in candidates.items()})
    ids = sorted({passage_id for found in candidates.values() for passage_id in found.ids})
    before = reranker.stats
    encodings = reranker.encode_passages([collection.passages[i] for i in ids], show_progress)
    encoded = dict(zip(ids, encodings, strict=True))
    lossy = [codec for codec in dict.fromkeys(codecs) if codec != "fp32"]
    settings = []
    total = len(dict.fromkeys(ratios)) * (1 + len(lossy)) * len(candidates)
    with tqdm(total=total, desc="Scoring", unit="query", disable=not show_progress) as progress:
        for ratio in dict.fromkeys(ratios):
            pooled = {passage_id: encoding.pool(ratio) for passage_id, encoding in encoded.items()}
            exact = _margins(reranker, candidates, pooled, progress)
            for codec in dict.fromkeys(codecs):
                values = {i: replace(encoding, codec=codec).to_metadata() for i, encoding in pooled.items()}
                margins = exact
                if codec in lossy:
                    read = {i: EncodedPassage.from_metadata(value) for i, value in values.items()}
                    margins = _margins(reranker, candidates, read, progress)
                reranked = {q: _order(found.ids, margins[q]) for q, found in candidates.items()}
                fused = {q: _order(found.ids, fuse(margins[q], found.scores, "z_score")) for q, found in candidates.items()}
                settings.append(
                    Setting(
                        ratio=ratio,
                        codec=codec,
                        mean_characters=fmean(map(len, values.values())),
                        max_score_change=max(_score_change(exact[q], margins[q]) for q in candidates),
                        rank_agreement=fmean(kendall_tau(exact[q], margins[q]) for q in candidates),
                        reranked=_measure(collection, baseline, reranked, seed),
                        fused=_measure(collection, baseline, fused, seed),
                    )
                )
    after = reranker.stats
    return Report(
        collection=collection.name,
        n_queries=len(candidates),
        top_k=top_k,
        seed=seed,
        n_passages=len(ids),
        encode_seconds=after.encode_seconds - before.encode_seconds,
        score_seconds=after.score_seconds - before.score_seconds,
        first_stage_ndcg=fmean(baseline.values()),
        settings=tuple(settings),
    )


def _check(reranker: KalmReranker, ratios: Sequence[int], codecs: Sequence[str], top_k: int, n_queries: int | None) -> None:
    for name, value in (("top_k", top_k), ("n_queries", n_queries)):
        if value is not None and value < 1:
            msg = f"{name} must be at least 1, but got {value}"
            raise SettingsError(msg)
    if not ratios or not codecs:
        msg = f"ratios and codecs must each name one at least, but got {list(ratios)} and {list(codecs)}"
        raise SettingsError(msg)
    for ratio in ratios:
        if ratio < 1 or ratio % reranker.compression_ratio:
            msg = f"ratios must be multiples of the reranker's compression_ratio={reranker.compression_ratio}, but got {ratio}"
            raise SettingsError(msg)
    for codec in codecs:
        check_codec(codec)


def _search(collection: Collection, top_k: int, n_queries: int | None, seed: int) -> dict[str, _Candidates]:
    """Return the first stage's candidates by query id."""
    if not collection.passages or not collection.queries:
        have = f"{len(collection.passages)} passages and {len(collection.queries)} judged queries"
        msg = f"a collection must have passages and judged queries, but {collection.name} has {have}; check the split"
        raise SettingsError(msg)
    query_ids = sorted(collection.queries)
    if n_queries is not None and n_queries < len(query_ids):
        query_ids = random.Random(seed).sample(query_ids, n_queries)
    passage_ids = list(collection.passages)
    queries = [collection.queries[i] for i in query_ids]
    # One more than asked for, in case one of them is the query itself.
    found = BM25(list(collection.passages.values())).search(queries, top_k + 1)
    candidates = {}
    for query_id, query, (indices, scores) in zip(query_ids, queries, found, strict=True):
        named = [(passage_ids[i], score) for i, score in zip(indices, scores, strict=True)]
        kept = [(passage_id, score) for passage_id, score in named if passage_id != query_id][:top_k]
        candidates[query_id] = _Candidates(query, [i for i, _ in kept], [score for _, score in kept])
    return candidates


def _margins(
    reranker: KalmReranker, candidates: Mapping[str, _Candidates], encoded: Mapping[str, EncodedPassage], progress: tqdm[Any]
) -> dict[str, list[float]]:
    """Return the margins of each query's candidates, in the first stage's order."""
    margins = {}
    for query_id, found in candidates.items():
        ranked = reranker.rank(found.query, [encoded[i] for i in found.ids])
        margins[query_id] = [passage.margin for passage in sorted(ranked, key=lambda passage: passage.index)]
        progress.update()
    return margins


def _score_change(exact: Sequence[float], other: Sequence[float]) -> float:
    """Return the largest difference between the probabilities of two lists of margins."""
    return max(abs(_sigmoid(a) - _sigmoid(b)) for a, b in zip(exact, other, strict=True))


def _sigmoid(margin: float) -> float:
    return 0.5 * (1 + math.tanh(margin / 2))


def _order(ids: Sequence[str], scores: Sequence[float]) -> list[str]:
    """Return ids by falling score; ties keep the first stage's order."""
    return [ids[i] for i in sorted(range(len(ids)), key=lambda i: -scores[i])]


def _measure(collection: Collection, baseline: dict[str, float], rankings: dict[str, list[str]], seed: int) -> Measured:
    values = ndcg_at_10(collection.qrels, rankings)
    differences = [values[query_id] - baseline[query_id] for query_id in baseline]
    return Measured(fmean(values.values()), fmean(differences), *bootstrap_interval(differences, seed))
