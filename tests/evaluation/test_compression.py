"""What compression costs: the figures, the Pareto line, the recommendation, the plot."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from tools.corpora import draw_collection

from kalm_integrations import KalmReranker, Passage
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.first_stage import find_candidates
from kalm_integrations.corpora.measures import ndcg_at_10
from kalm_integrations.errors import SettingsError
from kalm_integrations.evaluation.compression import (
    MIN_QUERIES,
    CollectionCosts,
    Cost,
    Recommendation,
    measure_costs,
    pareto,
    recommend,
    to_markdown,
    to_report,
)
from kalm_integrations.evaluation.differences import Difference, kendall_tau
from kalm_integrations.evaluation.plots import digest, plot_costs


@pytest.fixture(scope="module")
def collection() -> Collection:
    return draw_collection(n_passages=30, n_queries=5, n_words=12, n_asked=3)


@pytest.fixture(scope="module")
def reranker(tiny_checkpoint: Path) -> KalmReranker:
    return KalmReranker.from_pretrained(tiny_checkpoint, compression_ratio=1, storage_codec="fp32")


@pytest.fixture(scope="module")
def costs(collection: Collection, reranker: KalmReranker) -> CollectionCosts:
    return measure_costs(reranker, collection, ratios=[4], codecs=["fp16", "int8", "rot2"], top_k=12, rounds=1)


def test_costs_are_those_of_stored_encodings(
    collection: Collection, costs: CollectionCosts, make_reranker: Callable[..., KalmReranker]
) -> None:
    """Quality, changes of scores, agreement and bytes, worked out here from what a reranker stores at each setting."""
    assert [(c.ratio, c.codec) for c in costs.costs] == [(r, c) for r in (1, 4) for c in ("fp32", "fp16", "int8", "rot2")]
    candidates = find_candidates(collection, top_k=12)
    margins, scores = {}, {}
    for cost in costs.costs:
        reranker = make_reranker(compression_ratio=cost.ratio, storage_codec=cost.codec)
        used = sorted({i for found in candidates.values() for i in found.ids})
        stored = reranker.encode_to_metadata([collection.passages[i] for i in used])
        assert cost.mean_bytes == pytest.approx(fmean(len(metadata["kalm_encoding"]) for metadata in stored))
        encodings = dict(zip(used, stored, strict=True))
        own: dict[str, list[float]] = {}
        rankings = {}
        for query_id, found in candidates.items():
            passages = [Passage(collection.passages[i], encodings[i]["kalm_encoding"]) for i in found.ids]
            ranked = reranker.rank(found.query, passages)
            rankings[query_id] = [found.ids[p.index] for p in ranked]
            own[query_id] = [p.margin for p in sorted(ranked, key=lambda p: p.index)]
        margins[cost.ratio, cost.codec] = own
        scores[cost.ratio, cost.codec] = [1 / (1 + math.exp(-m)) for query in own.values() for m in query]
        values = ndcg_at_10(collection.qrels, rankings)
        assert cost.ndcg == pytest.approx(fmean(values.values()))
        assert cost.difference.mean == pytest.approx(cost.ndcg - costs.costs[0].ndcg)
        for baseline, expected in (((1, "fp32"), cost.max_score_change), ((cost.ratio, "fp32"), cost.codec_score_change)):
            changes = [abs(a - b) for a, b in zip(scores[baseline], scores[cost.ratio, cost.codec], strict=True)]
            assert expected == pytest.approx(max(changes), abs=1e-6)
        taus = [kendall_tau(margins[1, "fp32"][q], own[q]) for q in candidates]
        assert cost.rank_agreement == pytest.approx(fmean(taus), abs=1e-6)
        taus = [kendall_tau(margins[cost.ratio, "fp32"][q], own[q]) for q in candidates]
        assert cost.codec_rank_agreement == pytest.approx(fmean(taus), abs=1e-6)
        assert 0 <= cost.mean_score_change <= cost.max_score_change
        assert cost.decode_seconds > 0
    exact, *_ = costs.costs
    assert (exact.max_score_change, exact.rank_agreement, exact.difference) == (0, 1, Difference(0, 0, 0))
    changes = [cost.codec_score_change for cost in costs.costs[:4]]
    assert changes == sorted(changes), "the fewer bits a codec has, the more it changes"


def test_candidates_are_encoded_once_for_all_settings(
    collection: Collection, make_reranker: Callable[..., KalmReranker]
) -> None:
    reranker = make_reranker(compression_ratio=1)
    costs = measure_costs(reranker, collection, ratios=[2, 4, 8], codecs=["int8"], top_k=5, n_queries=3, rounds=2)
    assert reranker.stats.passages_encoded == costs.n_passages <= 15
    assert len(costs.costs) == 4 * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": [0]}, "but got 0"),
        ({"codecs": ["zip"]}, "storage_codec must be one of"),
        ({"rounds": 0}, "but got 1 and 0"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    collection: Collection, make_reranker: Callable[..., KalmReranker], options: dict[str, object], message: str
) -> None:
    reranker = make_reranker(compression_ratio=1)
    with pytest.raises(SettingsError, match=message):
        measure_costs(reranker, collection, **{"ratios": [4], "codecs": ["fp16"], **options})
    with pytest.raises(SettingsError, match="from compression_ratio=1, in one round at least, but got 2 and 5"):
        measure_costs(make_reranker(compression_ratio=2), collection, ratios=[4], codecs=["fp16"])
    assert reranker.stats.passages_encoded == 0


def cost(ratio: int, codec: str, size: float, ndcg: float, low: float, codec_change: float) -> Cost:
    return Cost(ratio, codec, size, ndcg, Difference(ndcg - 0.8, low, 0.0), 0.5, 0.1, 0.9, codec_change, 0.95, 1.0)


EXACT = cost(1, "fp32", 1000, 0.8, 0.0, 0.0)


def on(*costs: Cost) -> CollectionCosts:
    return CollectionCosts("c", MIN_QUERIES, 20, 0, 50, "bm25", 0.7, (EXACT, *costs))


def test_recommended_are_the_fewest_bytes_that_keep_order_and_scores_on_every_collection() -> None:
    good = [cost(2, "fp16", 250, 0.795, -0.015, 0.001), cost(2, "bf16", 250, 0.795, -0.015, 0.005)]
    moved = cost(2, "int8", 125, 0.796, -0.012, 0.02)
    lossy = cost(4, "int8", 60, 0.789, -0.018, 0.02)
    unsure = cost(8, "int8", 30, 0.799, -0.021, 0.02)
    assert recommend([on(*good, moved, lossy, unsure)]) == Recommendation((2, "int8"), (2, "fp16"), "")
    elsewhere = replace(moved, difference=Difference(-0.02, -0.03, -0.01))
    assert recommend([on(*good, moved), on(*good, elsewhere)]).order == (2, "fp16")


def test_too_few_queries_recommend_nothing() -> None:
    """Not even settings that differ on no query: a small sample may hold none of those that do."""
    enough = on(cost(32, "rot2", 30, 0.8, 0.0, 0.0))
    few = replace(enough, collection="few", n_queries=MIN_QUERIES - 1)
    assert recommend([enough]).order == (32, "rot2")
    for collections in ([few], [enough, few]):
        found = recommend(collections)
        assert (found.order, found.scores) == (None, None)
        assert f"needs {MIN_QUERIES} queries at least, but few gives {MIN_QUERIES - 1}" in found.reason


@pytest.mark.parametrize(
    ("costs", "reason"),
    [
        ([], "only ratio 1 in fp32 was measured"),
        (
            [cost(8, "rot2", 30, 0.799, -0.021, 0.02), cost(16, "rot2", 20, 0.799, -0.05, 0.02)],
            r"closest is ratio 8 in rot2, whose nDCG@10 differs by -0.001 \(-0.021 to \+0.000\): more queries would narrow",
        ),
        ([cost(8, "rot2", 30, 0.78, -0.025, 0.02)], "it loses more than 0.01; compare finer"),
    ],
)
def test_what_all_are_compared_with_is_no_recommendation(costs: list[Cost], reason: str) -> None:
    """Ratio 1 in float32 loses nothing by definition; where nothing else keeps the order, the reason says so."""
    found = recommend([on(*costs)])
    assert (found.order, found.scores) == (None, None)
    assert re.search(reason, found.reason)


def test_a_missing_recommendation_is_said_in_words(reranker: KalmReranker) -> None:
    order_only = to_report("tiny", reranker, [on(cost(2, "int8", 125, 0.796, -0.012, 0.02))])
    assert "where only the order counts: ratio 2, `int8`; where scores count too: none, because" in to_markdown(order_only)
    nothing = to_report("tiny", reranker, [on()])
    assert to_markdown(nothing).endswith("No setting is recommended: " + nothing["recommended"]["reason"] + ".\n")


def test_pareto_line_has_no_setting_that_another_beats() -> None:
    cheap, beaten, best = (cost(r, "rot2", size, ndcg, 0, 0) for r, size, ndcg in ((8, 10, 0.5), (4, 20, 0.4), (2, 30, 0.9)))
    assert pareto([best, beaten, cheap, EXACT]) == [cheap, best]


def test_report_survives_json_and_shows_its_figures(costs: CollectionCosts, reranker: KalmReranker) -> None:
    report = json.loads(json.dumps(to_report("tiny", reranker, [costs])))
    assert report["fingerprint"] == reranker.fingerprint
    lines = to_markdown(report).splitlines()
    rows = [line for line in lines if line.startswith(("| 1 |", "| 4 |"))]
    for row, own in zip(rows, costs.costs, strict=True):
        assert f"| `{own.codec}` | {own.mean_bytes:,.0f} |" in row
        assert f"{own.ndcg:.3f}" in row
        assert (f"**{own.ndcg:.3f}**" in row) == (own in pareto(costs.costs))
    assert lines[-1] == f"No setting is recommended: {recommend([costs]).reason}."


def test_plot_is_of_its_figures_and_reads_on_light_and_dark(
    costs: CollectionCosts, reranker: KalmReranker, tmp_path: Path
) -> None:
    """The digest of the report is in it, the same report gives the same file, and nothing is black or white."""
    report = to_report("tiny", reranker, [costs, costs])
    for name in ("a.svg", "b.svg"):
        plot_costs(report, tmp_path / name)
    svg = (tmp_path / "a.svg").read_text()
    assert svg == (tmp_path / "b.svg").read_text()
    assert digest(report) in svg
    assert digest(to_report("other", reranker, [costs])) != digest(report)
    assert "bytes per passage" in svg
    assert not {"#000000", "#ffffff"} & set(svg.replace(";", " ").replace('"', " ").split())
