"""Orders of the same candidates compared: a first stage's, rerankers', sums of both, and other models'."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from kalm_integrations.core.ranking import fuse
from kalm_integrations.core.reranker import KalmReranker
from kalm_integrations.corpora import peers
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.first_stage import BM25_NAME, Candidates, find_candidates, first_stage_name, order, run_path
from kalm_integrations.corpora.measures import measure
from kalm_integrations.corpora.runs import write_run
from kalm_integrations.errors import SettingsError
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
    """By baseline (the first stage, each other run and each peer): how much more the first measure is here."""
    ratio: int | None = None
    codec: str | None = None
    model: str | None = None
    """The reranker's label, where several are compared."""
    to_first_model: Difference | None = None
    """How much more the first measure is than with the first of these rerankers, at the same ratio and codec."""


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
    """Different candidates, each encoded once by each reranker."""
    encode_seconds: float
    score_seconds: float
    measures: tuple[str, ...]
    systems: tuple[System, ...]
    """The first stage, the other runs, the peers, and each reranker alone and summed at each ratio and codec."""

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
        columns = [*self.measures, *(f"to {name}" for name in (first_stage.name, *baselines))]
        first_model = next((system.model for system in others if system.model is not None), None)
        if first_model is not None:
            columns.append(f"to {first_model}")
        for name in columns:
            table.add_column(name, justify="right")
        for system in self.systems:
            cells = [f"{system.means[name]:.3f}" for name in self.measures]
            cells += [str(system.differences.get(name, "")) for name in (first_stage.name, *baselines)]
            if first_model is not None:
                cells.append(str(system.to_first_model or ""))
            table.add_row(system.name, *cells)
        return table


@dataclass(frozen=True)
class _Setting:
    """Whose order it is: a reranker's alone or summed, at a ratio and codec."""

    model: str
    """Empty where it is the only one."""
    is_sum: bool
    ratio: int
    codec: str

    def name(self, first_stage: str) -> str:
        """Return what a report calls it."""
        words = [self.model, f"+ {first_stage}"] if self.is_sum else [self.model or "reranked"]
        return " ".join([*filter(None, words), f"r{self.ratio}", self.codec])


def evaluate(
    reranker: KalmReranker | Mapping[str, Callable[[], KalmReranker]],
    collection: Collection,
    *,
    ratios: Sequence[int],
    codecs: Sequence[str],
    first_stage: str = BM25_NAME,
    other_runs: Sequence[str] = (),
    cross_encoders: Sequence[str] = (),
    bi_encoders: Sequence[str] = (),
    measures: Sequence[str] = (DEFAULT_MEASURE,),
    top_k: int = 20,
    n_queries: int | None = None,
    seed: int = 0,
    run_folder: Path | None = None,
    show_progress: bool = False,
) -> Report:
    """Reorder a first stage's candidates by a reranker, or by several, at every ratio and codec, and by other models.

    Each different candidate is encoded once, at the reranker's own ratio; see `score_settings` for the rest.

    Args:
        reranker: its `compression_ratio` must divide all `ratios`, its `storage_codec` be fp32. To compare several, by label
            what opens each: they are opened one after the other, so that one is in memory at a time.
        collection: what to search in.
        ratios: compression ratios to compare.
        codecs: storage codecs to compare.
        first_stage: where the candidates come from; see `find_candidates`.
        other_runs: TREC run files to compare with as they are: the `top_k` best of each, whatever the first stage found.
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
    if isinstance(reranker, KalmReranker):
        check_ratios_and_codecs(reranker, ratios, codecs)
    elif not reranker:
        msg = "there must be a reranker at least, but got none"
        raise SettingsError(msg)
    check_comparable(measures)
    candidates = find_candidates(collection, first_stage, top_k, n_queries, seed)
    first_name = first_stage_name(first_stage)
    orders = {first_name: {q: found.ids for q, found in candidates.items()}}
    for run in other_runs:
        if not run_path(run, collection).is_file():
            msg = f"a run to compare with must be a TREC run file, but {run!r} is none"
            raise SettingsError(msg)
        found_by_run = find_candidates(collection, run, top_k, n_queries, seed)
        orders[_free_name(run, orders)] = {q: found.ids for q, found in found_by_run.items()}
    kinds = ((peers.score_by_cross_encoder, cross_encoders), (peers.score_by_bi_encoder, bi_encoders))
    for score, models in kinds:
        for model in models:
            orders[_free_name(model, orders)] = _order_by_peer(score, model, collection, candidates)
    baselines = list(orders)
    openers = {"": lambda: reranker} if isinstance(reranker, KalmReranker) else reranker
    reranked = []
    for label, open_reranker in openers.items():
        reranked.append(_rerank(open_reranker(), label, collection, candidates, ratios, codecs, show_progress))
        # The parts of a reranker refer to each other: without this its weights may stay while the next one's are loaded.
        gc.collect()
    settings = {setting.name(first_name): setting for each in reranked for setting in each.orders}
    orders |= {setting.name(first_name): rankings for each in reranked for setting, rankings in each.orders.items()}
    if run_folder is not None:
        run_folder.mkdir(parents=True, exist_ok=True)
        for name, rankings in orders.items():
            file_name = name.replace("+ ", "plus ").replace(" ", "-").replace("/", "_")
            write_run(run_folder / f"{collection.name}.{file_name}.trec", name, rankings)
    return Report(
        collection=collection.name,
        n_queries=len(candidates),
        top_k=top_k,
        seed=seed,
        n_passages=reranked[0].n_passages,
        encode_seconds=sum(each.encode_seconds for each in reranked),
        score_seconds=sum(each.score_seconds for each in reranked),
        measures=tuple(measures),
        systems=_measure_systems(collection, orders, baselines, settings, measures, seed),
    )


@dataclass(frozen=True)
class _Reranked:
    """What one reranker makes of the candidates."""

    orders: dict[_Setting, dict[str, list[str]]]
    n_passages: int
    encode_seconds: float
    score_seconds: float


def _rerank(
    reranker: KalmReranker,
    label: str,
    collection: Collection,
    candidates: Mapping[str, Candidates],
    ratios: Sequence[int],
    codecs: Sequence[str],
    show_progress: bool,
) -> _Reranked:
    check_ratios_and_codecs(reranker, ratios, codecs)
    before = reranker.stats
    encoded = encode_candidates(reranker, collection, candidates, show_progress)
    orders: dict[_Setting, dict[str, list[str]]] = {}
    for scored in score_settings(reranker, candidates, encoded, ratios, codecs, show_progress):
        for is_sum in (False, True):
            orders[_Setting(label, is_sum, scored.ratio, scored.codec)] = {
                q: order(found.ids, fuse(margins, found.scores, "z_score") if is_sum else margins)
                for (q, found), margins in zip(candidates.items(), scored.margins.values(), strict=True)
            }
    after = reranker.stats
    return _Reranked(
        orders, len(encoded), after.encode_seconds - before.encode_seconds, after.score_seconds - before.score_seconds
    )


def _free_name(path: str, taken: Mapping[str, object]) -> str:
    """Return the last part of a path or hub id, or the whole where that is taken."""
    return Path(path).name if Path(path).name not in taken else path


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
    settings: Mapping[str, _Setting],
    measures: Sequence[str],
    seed: int,
) -> tuple[System, ...]:
    values = {name: measure(collection.qrels, rankings, measures) for name, rankings in orders.items()}
    first = {name: list(by_measure[measures[0]].values()) for name, by_measure in values.items()}
    pairs = [(name, baseline) for name in orders for baseline in baselines if baseline != name]
    # With the first-named reranker, at the same setting, each of the others is compared.
    first_label = next(iter(settings.values())).model
    names = {setting: name for name, setting in settings.items()}
    like = {name: names[replace(s, model=first_label)] for name, s in settings.items() if s.model != first_label}
    pairs += like.items()
    gains = [[a - b for a, b in zip(first[name], first[baseline], strict=True)] for name, baseline in pairs]
    differences = dict(zip(pairs, mean_differences(gains, seed), strict=True))
    systems = []
    for name, by_measure in values.items():
        means = {m: fmean(by_query.values()) for m, by_query in by_measure.items()}
        own = {baseline: differences[name, baseline] for baseline in baselines if baseline != name}
        system = System(name, means, own)
        if name in settings:
            setting = settings[name]
            to_first = differences[name, like[name]] if name in like else None
            system = System(name, means, own, setting.ratio, setting.codec, setting.model or None, to_first)
        systems.append(system)
    return tuple(systems)
