"""What compression costs: quality, scores and time against bytes, by ratio, codec and collection."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, median
from typing import Any

from kalm_integrations.core.passages.encoding import EncodedPassage
from kalm_integrations.core.ranking import sigmoid
from kalm_integrations.core.reranker import KalmReranker
from kalm_integrations.core.types import Passage
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.first_stage import BM25_NAME, Candidates, find_candidates, order
from kalm_integrations.corpora.measures import ndcg_at_10
from kalm_integrations.errors import SettingsError
from kalm_integrations.evaluation.differences import Difference, check_comparable, kendall_tau, mean_differences
from kalm_integrations.evaluation.scoring import EXACT, Scored, check_ratios_and_codecs, encode_candidates, score_settings

N_TIMED = 100
"""Candidates that a timed query has; where there are fewer, the time is scaled to as many."""

MAX_LOSS = 0.01
"""A recommended setting loses at most this nDCG@10 on every collection, against ratio 1 in float32 …"""
MAX_PLAUSIBLE_LOSS = 0.02
"""… and the 95 % interval of the difference does not reach further than this."""
MIN_QUERIES = 200
"""On fewer queries nothing is recommended. Most queries do not tell two settings apart, so a small sample may hold few or none
of those that do: then the bootstrap's interval is too narrow, and of many settings some pass by chance."""
MAX_CODEC_CHANGE = 0.01
"""Where scores count, its codec moves none by more: a passage scores the same whether its encoding is read or made."""


@dataclass(frozen=True)
class Cost:
    """What one ratio and codec cost on one collection, against ratio 1 in float32."""

    ratio: int
    codec: str
    mean_bytes: float
    """Mean length of a passage's metadata string, which is ASCII."""
    ndcg: float
    difference: Difference
    """Of nDCG@10."""
    max_score_change: float
    mean_score_change: float
    rank_agreement: float
    """Kendall's tau of the two orders, mean over queries."""
    codec_score_change: float
    """Largest change of a score by the codec alone: against float32 at the same ratio."""
    codec_rank_agreement: float
    """Kendall's tau with the order by float32 at the same ratio, mean over queries."""
    decode_seconds: float
    """To read 100 candidates from their strings and score them for one query: median of interleaved rounds."""


@dataclass(frozen=True)
class CollectionCosts:
    """The costs on one collection."""

    collection: str
    n_queries: int
    top_k: int
    """Candidates per query."""
    seed: int
    """Of the sample of queries, and of the bootstrap."""
    n_passages: int
    """Different candidates, each encoded once."""
    first_stage: str
    first_stage_ndcg: float
    costs: tuple[Cost, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


def measure_costs(
    reranker: KalmReranker,
    collection: Collection,
    *,
    ratios: Sequence[int],
    codecs: Sequence[str],
    first_stage: str = BM25_NAME,
    top_k: int = 20,
    n_queries: int | None = None,
    seed: int = 0,
    rounds: int = 5,
    timed_reranker: KalmReranker | None = None,
    show_progress: bool = False,
) -> CollectionCosts:
    """Score a first stage's candidates from encodings at every ratio and codec.

    Ratio 1 and float32 are always among them: everything is compared with these. Each different candidate is encoded once,
    at ratio 1.

    Args:
        reranker: its `compression_ratio` must be 1, its `storage_codec` fp32.
        collection: what to search in.
        ratios: compression ratios.
        codecs: storage codecs.
        first_stage: where the candidates come from; see `find_candidates`.
        top_k: candidates per query.
        n_queries: how many queries to draw; None, or as many as there are, takes all.
        seed: of that draw, and of the bootstrap.
        rounds: of timing; each scores one query at every setting.
        timed_reranker: of the same fingerprint, for the times, if it should not be `reranker`.
        show_progress: draw progress bars.

    Raises:
        SettingsError: an argument is out of range, or the collection has no passages or no judged queries.
        MissingExtraError: the extra `eval` is not installed.
    """
    if reranker.compression_ratio != 1 or rounds < 1:
        got = f"{reranker.compression_ratio} and {rounds}"
        msg = f"compression is measured from compression_ratio=1, in one round at least, but got {got}"
        raise SettingsError(msg)
    ratios, codecs = sorted({1, *ratios}), list(dict.fromkeys((EXACT, *codecs)))
    check_ratios_and_codecs(reranker, ratios, codecs)
    check_comparable()
    candidates = find_candidates(collection, first_stage, top_k, n_queries, seed)
    encoded = encode_candidates(reranker, collection, candidates, show_progress)
    scored = list(score_settings(reranker, candidates, encoded, ratios, codecs, show_progress))
    seconds = _decode_seconds(timed_reranker or reranker, collection, candidates, encoded, scored, rounds)
    found = ndcg_at_10(collection.qrels, {q: c.ids for q, c in candidates.items()})
    values = [
        ndcg_at_10(collection.qrels, {q: order(c.ids, setting.margins[q]) for q, c in candidates.items()})
        for setting in scored
    ]
    uncompressed, baseline = scored[0], values[0]
    exact = {setting.ratio: setting for setting in scored if setting.codec == EXACT}
    gains = [[by_query[q] - baseline[q] for q in candidates] for by_query in values]
    costs = []
    for setting, by_query, difference in zip(scored, values, mean_differences(gains, seed), strict=True):
        changes = _score_changes(uncompressed, setting)
        costs.append(
            Cost(
                ratio=setting.ratio,
                codec=setting.codec,
                mean_bytes=setting.mean_bytes,
                ndcg=fmean(by_query.values()),
                difference=difference,
                max_score_change=max(changes),
                mean_score_change=fmean(changes),
                rank_agreement=fmean(kendall_tau(uncompressed.margins[q], setting.margins[q]) for q in candidates),
                codec_score_change=max(_score_changes(exact[setting.ratio], setting)),
                codec_rank_agreement=fmean(
                    kendall_tau(exact[setting.ratio].margins[q], setting.margins[q]) for q in candidates
                ),
                decode_seconds=seconds[setting.ratio, setting.codec],
            )
        )
    return CollectionCosts(
        collection=collection.name,
        n_queries=len(candidates),
        top_k=top_k,
        seed=seed,
        n_passages=len(encoded),
        first_stage=first_stage,
        first_stage_ndcg=fmean(found.values()),
        costs=tuple(costs),
    )


def _decode_seconds(
    reranker: KalmReranker,
    collection: Collection,
    candidates: Mapping[str, Candidates],
    encoded: Mapping[str, EncodedPassage],
    scored: Sequence[Scored],
    rounds: int,
) -> dict[tuple[int, str], float]:
    """Return by ratio and codec how long one query takes for 100 candidates that come with their stored strings."""
    query = next(iter(candidates.values())).query
    stored = {}
    for setting in scored:
        pooled = ((i, replace(encoded[i].pool(setting.ratio), codec=setting.codec)) for i in list(encoded)[:N_TIMED])
        stored[setting.ratio, setting.codec] = [Passage(collection.passages[i], e.to_metadata()) for i, e in pooled]
    times: dict[tuple[int, str], list[float]] = {key: [] for key in stored}
    # One round more than is counted: the first loads and warms up.
    for is_counted in (False, *[True] * rounds):
        for key, passages in stored.items():
            started = time.perf_counter()
            reranker.score(query, passages)
            if is_counted:
                times[key].append((time.perf_counter() - started) * N_TIMED / len(passages))
    return {key: median(taken) for key, taken in times.items()}


def _score_changes(first: Scored, second: Scored) -> list[float]:
    """Return how much the probability of each candidate of each query differs."""
    return [
        abs(sigmoid(a) - sigmoid(b))
        for query_id, margins in first.margins.items()
        for a, b in zip(margins, second.margins[query_id], strict=True)
    ]


@dataclass(frozen=True)
class Recommendation:
    """Which ratio and codec to store at, as far as the queries say."""

    order: tuple[int, str] | None
    """If only the order counts."""
    scores: tuple[int, str] | None
    """If a threshold on scores does, too."""
    reason: str
    """Why there is none, and what to do; empty where there are both."""


def recommend(collections: Sequence[CollectionCosts]) -> Recommendation:
    """Return the setting with the fewest bytes that keeps the order, and the one that keeps scores, too.

    The order is kept by a setting that on every collection loses at most `MAX_LOSS`, with an interval that does not reach
    beyond `MAX_PLAUSIBLE_LOSS`; scores are kept if its codec moves none by more than `MAX_CODEC_CHANGE`, too. Of settings with
    as many bytes, it is the one that changes scores less. Ratio 1 in float32, with which all are compared, is not among them,
    and on fewer than `MIN_QUERIES` none is.
    """
    small = min(collections, key=lambda c: c.n_queries)
    if small.n_queries < MIN_QUERIES:
        reason = (
            f"a recommendation needs {MIN_QUERIES} queries at least, but {small.collection} gives {small.n_queries}, on which "
            "settings can pass by chance; take more queries, or leave the collection out"
        )
        return Recommendation(None, None, reason)
    by_setting: dict[tuple[int, str], list[Cost]] = {}
    for collection in collections:
        for cost in collection.costs:
            if (cost.ratio, cost.codec) != (1, EXACT):
                by_setting.setdefault((cost.ratio, cost.codec), []).append(cost)
    keeps_order = {
        key: costs
        for key, costs in by_setting.items()
        if all(c.difference.mean >= -MAX_LOSS and c.difference.low >= -MAX_PLAUSIBLE_LOSS for c in costs)
    }
    keeps_scores = {
        key: costs for key, costs in keeps_order.items() if all(c.codec_score_change <= MAX_CODEC_CHANGE for c in costs)
    }

    def fewest_bytes(settings: dict[tuple[int, str], list[Cost]]) -> tuple[int, str] | None:
        return min(
            settings,
            key=lambda k: (round(fmean(c.mean_bytes for c in settings[k])), max(c.codec_score_change for c in settings[k])),
            default=None,
        )

    reason = ""
    if not keeps_order:
        reason = _why_no_order(by_setting)
    elif not keeps_scores:
        reason = f"no setting that keeps the order has a codec that moves no score by more than {MAX_CODEC_CHANGE}"
        reason += "; compare finer codecs, such as int8 or fp16"
    return Recommendation(fewest_bytes(keeps_order), fewest_bytes(keeps_scores), reason)


def _why_no_order(by_setting: Mapping[tuple[int, str], Sequence[Cost]]) -> str:
    if not by_setting:
        return "only ratio 1 in fp32 was measured, with which others are compared; name more --ratios or --codecs"
    worst = {key: min(costs, key=lambda c: c.difference.low) for key, costs in by_setting.items()}
    closest = max(worst.values(), key=lambda c: c.difference.low)
    reason = (
        f"no setting is sure to keep the order; the closest is ratio {closest.ratio} in {closest.codec}, whose nDCG@10 "
        f"differs by {closest.difference}"
    )
    if closest.difference.mean >= -MAX_LOSS:
        return f"{reason}: more queries would narrow the interval, which must not reach below {-MAX_PLAUSIBLE_LOSS}"
    return f"{reason}: it loses more than {MAX_LOSS}; compare finer --ratios and --codecs"


def pareto(costs: Sequence[Cost]) -> list[Cost]:
    """Return the costs that no other beats in bytes without losing nDCG@10, by rising bytes."""
    line: list[Cost] = []
    for cost in sorted(costs, key=lambda c: (c.mean_bytes, -c.ndcg)):
        if not line or cost.ndcg > line[-1].ndcg:
            line.append(cost)
    return line


def to_report(model: str, reranker: KalmReranker, collections: Sequence[CollectionCosts]) -> dict[str, Any]:
    """Return everything as plain values, for JSON, for `to_markdown` and for `plots.plot_costs`."""
    found = recommend(collections)
    chosen = {"order": found.order, "scores": found.scores}
    recommended: dict[str, Any] = {
        use: None if setting is None else {"ratio": setting[0], "codec": setting[1]} for use, setting in chosen.items()
    }
    recommended["reason"] = found.reason
    on_line = [{(cost.ratio, cost.codec) for cost in pareto(c.costs)} for c in collections]
    rows = []
    for collection, line in zip(collections, on_line, strict=True):
        row = collection.to_dict()
        for cost in row["costs"]:
            cost["is_pareto"] = (cost["ratio"], cost["codec"]) in line
        rows.append(row)
    fingerprint, *of_windows = reranker.fingerprints
    return {
        "model": model,
        "fingerprint": fingerprint,
        "windows_fingerprint": of_windows[0] if of_windows else None,
        "device": str(reranker.runtime.device),
        "dtype": str(reranker.runtime.dtype).removeprefix("torch."),
        "recommended": recommended,
        "collections": rows,
    }


def to_markdown(report: Mapping[str, Any]) -> str:
    """Return tables and recommendation as Markdown."""
    parts = []
    for collection in report["collections"]:
        first_stage = f"{collection['first_stage']} (nDCG@10 {collection['first_stage_ndcg']:.3f})"
        parts.append(
            f"**{collection['collection']}**: {collection['n_queries']:,} queries, the {collection['top_k']} best of "
            f"{first_stage}, {collection['n_passages']:,} different passages; `{report['model']}` in {report['dtype']} on "
            f"{report['device']}.\n"
        )
        parts.append(
            "| ratio | codec | bytes | nDCG@10 | to ratio 1, fp32 | max Δ | mean Δ | tau | max Δ of codec | s / 100 |"
        )
        parts.append("|--:|---|--:|--:|---|--:|--:|--:|--:|--:|")
        parts += [*map(_row, collection["costs"]), ""]
    parts.append(_recommended(report["recommended"]))
    return "\n".join(parts)


def _recommended(recommended: Mapping[str, Any]) -> str:
    order, scores, reason = (recommended[name] for name in ("order", "scores", "reason"))
    if order is None:
        return f"No setting is recommended: {reason}.\n"
    uses = {"where only the order counts": order, "where scores count too": scores}
    said = [f"{use}: ratio {r['ratio']}, `{r['codec']}`" if r else f"{use}: none, because {reason}" for use, r in uses.items()]
    return f"Recommended {'; '.join(said)}.\n"


def _row(cost: Mapping[str, Any]) -> str:
    ndcg = f"**{cost['ndcg']:.3f}**" if cost["is_pareto"] else f"{cost['ndcg']:.3f}"
    changes = (f"{cost[name]:.1g}" for name in ("max_score_change", "mean_score_change"))
    cells = (
        str(cost["ratio"]),
        f"`{cost['codec']}`",
        f"{cost['mean_bytes']:,.0f}",
        ndcg,
        str(Difference(**cost["difference"])),
        *changes,
        f"{cost['rank_agreement']:.3f}",
        f"{cost['codec_score_change']:.1g}",
        f"{cost['decode_seconds']:.3f}",
    )
    return f"| {' | '.join(cells)} |"
