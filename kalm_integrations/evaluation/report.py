"""Orders of the same candidates compared: a first stage's, the reranker's, the sum of both, and other models'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from kalm_integrations.core.ranking import fuse
from kalm_integrations.core.reranker import KalmReranker
from kalm_integrations.corpora import peers
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.first_stage import BM25_NAME, Candidates, find_candidates, first_stage_name, order
from kalm_integrations.corpora.measures import measure
from kalm_integrations.corpora.runs import write_run
from kalm_integrations.evaluation.differences import Difference, check_comparable, mean_differences
from kalm_integrations.evaluation.scoring import check_ratios_and_codecs, encode_candidates, score_settings

if TYPE_CHECKING:
    from rich.table import Table

DEFAULT_MEASURE = "nDCG@10"


@dataclass(frozen=True)
class System:
    """An order of the candidates, and what it is worth."""

    name: str
    means: dict[str, float]
    """By measure: the mean over queries."""
    differences: dict[str, Difference]
    """By baseline (the first stage and each peer): how much more the first measure is here."""
    ratio: int | None = None
    codec: str | None = None


@dataclass(frozen=True)
class Report:
    """A comparison on one collection."""

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
    measures: tuple[str, ...]
    systems: tuple[System, ...]
    """The first stage, the peers, and the reranker alone and summed at each ratio and codec."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    def to_table(self) -> Table:
        """Return a table for the terminal."""
        from rich.table import Table
        from rich.text import Text

        first_stage, *others = self.systems
        title = f"{self.collection}: {self.n_queries:,} queries, the {self.top_k} best of {first_stage.name} reordered"
        table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
        table.add_column("order")
        baselines = [name for name in others[0].differences if name != first_stage.name]
        for name in (*self.measures, *(f"to {name}" for name in (first_stage.name, *baselines))):
            table.add_column(name, justify="right")
        for system in self.systems:
            means = (f"{system.means[name]:.3f}" for name in self.measures)
            differences = (str(system.differences.get(name, "")) for name in (first_stage.name, *baselines))
            table.add_row(system.name, *means, *differences)
        return table


def evaluate(
    reranker: KalmReranker,
    collection: Collection,
    *,
    ratios: Sequence[int],
    codecs: Sequence[str],
    first_stage: str = BM25_NAME,
    cross_encoders: Sequence[str] = (),
    bi_encoders: Sequence[str] = (),
    measures: Sequence[str] = (DEFAULT_MEASURE,),
    top_k: int = 20,
    n_queries: int | None = None,
    seed: int = 0,
    run_folder: Path | None = None,
    show_progress: bool = False,
) -> Report:
    """Reorder a first stage's candidates by the reranker, at every ratio and codec, and by other models.

    Each different candidate is encoded once, at the reranker's own ratio; see `score_settings` for the rest.

    Args:
        reranker: its `compression_ratio` must divide all `ratios`, its `storage_codec` be fp32.
        collection: what to search in.
        ratios: compression ratios to compare.
        codecs: storage codecs to compare.
        first_stage: where the candidates come from; see `find_candidates`.
        cross_encoders: of sentence-transformers, to compare with.
        bi_encoders: of sentence-transformers, to compare with.
        measures: names of ir-measures; differences are of the first.
        top_k: candidates per query.
        n_queries: how many queries to draw; None, or as many as there are, takes all.
        seed: of that draw, and of the bootstrap.
        run_folder: where to write every order as a TREC run file; None writes none.
        show_progress: draw progress bars.

    Raises:
        SettingsError: an argument is out of range, or the collection has no passages or no judged queries.
        MissingExtraError: the extra `eval` is not installed, or what a peer needs.
    """
    check_ratios_and_codecs(reranker, ratios, codecs)
    check_comparable(measures)
    candidates = find_candidates(collection, first_stage, top_k, n_queries, seed)
    first_name = first_stage_name(first_stage)
    orders: dict[str, dict[str, list[str]]] = {first_name: {q: found.ids for q, found in candidates.items()}}
    kinds = ((peers.score_by_cross_encoder, cross_encoders), (peers.score_by_bi_encoder, bi_encoders))
    for score, models in kinds:
        for model in models:
            name = Path(model).name if Path(model).name not in orders else model
            orders[name] = _order_by_peer(score, model, collection, candidates)
    baselines = list(orders)
    before = reranker.stats
    encoded = encode_candidates(reranker, collection, candidates, show_progress)
    settings: dict[str, tuple[int, str]] = {}
    for scored in score_settings(reranker, candidates, encoded, ratios, codecs, show_progress):
        alone, summed = (f"{name} r{scored.ratio} {scored.codec}" for name in ("reranked", f"+ {first_name}"))
        settings[alone] = settings[summed] = (scored.ratio, scored.codec)
        orders[alone] = {q: order(found.ids, scored.margins[q]) for q, found in candidates.items()}
        orders[summed] = {
            q: order(found.ids, fuse(scored.margins[q], found.scores, "z_score")) for q, found in candidates.items()
        }
    after = reranker.stats
    if run_folder is not None:
        run_folder.mkdir(parents=True, exist_ok=True)
        for name, rankings in orders.items():
            file_name = name.replace("+ ", "plus ").replace(" ", "-")
            write_run(run_folder / f"{collection.name}.{file_name}.trec", name, rankings)
    return Report(
        collection=collection.name,
        n_queries=len(candidates),
        top_k=top_k,
        seed=seed,
        n_passages=len(encoded),
        encode_seconds=after.encode_seconds - before.encode_seconds,
        score_seconds=after.score_seconds - before.score_seconds,
        measures=tuple(measures),
        systems=_measure_systems(collection, orders, baselines, settings, measures, seed),
    )


def _order_by_peer(
    score: Callable[[str, Sequence[tuple[str, str]]], list[float]],
    model: str,
    collection: Collection,
    candidates: dict[str, Candidates],
) -> dict[str, list[str]]:
    pairs = [(found.query, collection.passages[i]) for found in candidates.values() for i in found.ids]
    scores = iter(score(model, pairs))
    return {q: order(found.ids, [next(scores) for _ in found.ids]) for q, found in candidates.items()}


def _measure_systems(
    collection: Collection,
    orders: dict[str, dict[str, list[str]]],
    baselines: Sequence[str],
    settings: dict[str, tuple[int, str]],
    measures: Sequence[str],
    seed: int,
) -> tuple[System, ...]:
    values = {name: measure(collection.qrels, rankings, measures) for name, rankings in orders.items()}
    first = {name: list(by_measure[measures[0]].values()) for name, by_measure in values.items()}
    pairs = [(name, baseline) for name in orders for baseline in baselines if baseline != name]
    gains = [[a - b for a, b in zip(first[name], first[baseline], strict=True)] for name, baseline in pairs]
    differences = dict(zip(pairs, mean_differences(gains, seed), strict=True))
    systems = []
    for name, by_measure in values.items():
        means = {m: fmean(by_query.values()) for m, by_query in by_measure.items()}
        own = {baseline: differences[name, baseline] for baseline in baselines if baseline != name}
        systems.append(System(name, means, own, *settings.get(name, (None, None))))
    return tuple(systems)
