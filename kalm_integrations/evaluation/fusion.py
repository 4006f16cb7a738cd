"""What fusing a reranker's scores with the first stage's is worth, by method and weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from kalm_integrations.core.ranking import RankRules, check_fusion
from kalm_integrations.core.reranker import KalmReranker
from kalm_integrations.core.types import FusionMethod
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.first_stage import BM25_NAME, find_candidates, first_stage_name
from kalm_integrations.corpora.measures import ndcg_at_10
from kalm_integrations.errors import SettingsError
from kalm_integrations.evaluation.differences import Difference, check_comparable, mean_differences
from kalm_integrations.evaluation.scoring import count_pairs, encode_candidates, score_candidates

if TYPE_CHECKING:
    from rich.table import Table

METHODS: tuple[FusionMethod, ...] = ("z_score", "reciprocal_rank")
WEIGHTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class FusedOrder:
    """The order by one method and weight, and what it is worth."""

    method: FusionMethod
    weight: float
    ndcg: float
    to_first_stage: Difference
    """How much more than the first stage's order."""
    to_reranker: Difference
    """How much more than the reranker's order."""


@dataclass(frozen=True)
class FusionReport:
    """Methods and weights compared on one collection, by nDCG@10."""

    collection: str
    first_stage: str
    n_queries: int
    top_k: int
    """Candidates per query."""
    ratio: int
    """The reranker's compression ratio."""
    seed: int
    """Of the sample of queries, and of the bootstrap."""
    first_stage_ndcg: float
    reranker_ndcg: float
    orders: tuple[FusedOrder, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    def to_table(self) -> Table:
        """Return a table for the terminal."""
        from rich.table import Table
        from rich.text import Text

        title = f"{self.collection}: {self.n_queries:,} queries, the {self.top_k} best of {self.first_stage}, r={self.ratio}"
        table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
        table.add_column("order")
        for name in ("weight", "nDCG@10", f"to {self.first_stage}", "to the reranker"):
            table.add_column(name, justify="right")
        table.add_row(self.first_stage, "", f"{self.first_stage_ndcg:.3f}")
        table.add_row("reranker", "", f"{self.reranker_ndcg:.3f}")
        for fused in self.orders:
            differences = (fused.to_first_stage, fused.to_reranker)
            table.add_row(fused.method, f"{fused.weight:g}", f"{fused.ndcg:.3f}", *map(str, differences))
        return table


def compare_fusions(
    reranker: KalmReranker,
    collection: Collection,
    *,
    weights: Sequence[float] = WEIGHTS,
    first_stage: str = BM25_NAME,
    top_k: int = 20,
    n_queries: int | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> FusionReport:
    """Order a first stage's candidates by every method at every weight, as `KalmReranker.rank` does.

    Args:
        reranker: scores each candidate once, at its own ratio.
        collection: what to search in.
        weights: the reranker's share, from 0 to 1.
        first_stage: where the candidates come from; see `find_candidates`.
        top_k: candidates per query.
        n_queries: how many queries to draw; None, or as many as there are, takes all.
        seed: of that draw, and of the bootstrap.
        show_progress: draw progress bars.

    Raises:
        SettingsError: an argument is out of range, or the collection has no passages or no judged queries.
        MissingExtraError: the extra `eval` is not installed.
    """
    if not weights:
        msg = "weights must name one at least, but got none"
        raise SettingsError(msg)
    for weight in weights:
        check_fusion(METHODS[0], weight)
    check_comparable()
    candidates = find_candidates(collection, first_stage, top_k, n_queries, seed)
    encoded = encode_candidates(reranker, collection, candidates, show_progress)
    with tqdm(total=count_pairs(candidates), desc="Scoring", unit="pair", disable=not show_progress) as progress:
        margins = score_candidates(reranker, candidates, encoded, progress)

    def measure(method: FusionMethod | None = None, weight: float | None = None) -> list[float]:
        """Return each query's nDCG@10 in a fused order, or in the reranker's."""
        rankings = {}
        for query_id, found in candidates.items():
            scores = found.scores if method == "z_score" else None
            values, texts = margins[query_id], [None] * len(found.ids)
            ranked = RankRules(fusion=method, fusion_weight=weight).apply(values, values, texts, scores)
            rankings[query_id] = [found.ids[passage.index] for passage in ranked]
        return list(ndcg_at_10(collection.qrels, rankings).values())

    first = list(ndcg_at_10(collection.qrels, {q: found.ids for q, found in candidates.items()}).values())
    alone = measure()
    settings = [(method, weight) for method in METHODS for weight in weights]
    values = [measure(*setting) for setting in settings]
    gains = [[a - b for a, b in zip(fused, baseline, strict=True)] for fused in values for baseline in (first, alone)]
    differences = iter(mean_differences(gains, seed))
    orders = [
        FusedOrder(method, weight, fmean(fused), next(differences), next(differences))
        for (method, weight), fused in zip(settings, values, strict=True)
    ]
    return FusionReport(
        collection=collection.name,
        first_stage=first_stage_name(first_stage),
        n_queries=len(candidates),
        top_k=top_k,
        ratio=reranker.compression_ratio,
        seed=seed,
        first_stage_ndcg=fmean(first),
        reranker_ndcg=fmean(alone),
        orders=tuple(orders),
    )
