"""`kalm eval fusion`: methods and weights compared with both stages, as rankings are fused in use."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from tools.corpora import draw_collection, write_collection
from typer.testing import CliRunner

from kalm_integrations import KalmReranker
from kalm_integrations.cli import app
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.first_stage import find_candidates
from kalm_integrations.corpora.measures import ndcg_at_10
from kalm_integrations.errors import SettingsError
from kalm_integrations.evaluation.differences import mean_differences
from kalm_integrations.evaluation.fusion import WEIGHTS, FusionReport, compare_fusions


@pytest.fixture(scope="module")
def collection() -> Collection:
    return draw_collection(n_queries=8)


@pytest.fixture(scope="module")
def reranker(tiny_checkpoint: Path) -> KalmReranker:
    return KalmReranker.from_pretrained(tiny_checkpoint, compression_ratio=2)


@pytest.fixture(scope="module")
def report(collection, reranker) -> FusionReport:
    return compare_fusions(reranker, collection, weights=[0, 0.3, 1], top_k=6, seed=5)


def test_orders_are_those_that_ranking_gives(collection, reranker, report):
    """Of each method and weight: nDCG@10, and its difference to both stages with the paired interval."""
    candidates = find_candidates(collection, top_k=6)

    def values(**fusion):
        rankings = {}
        for query_id, found in candidates.items():
            scores = {"first_stage_scores": found.scores} if fusion.get("fusion") == "z_score" else {}
            ranked = reranker.rank(found.query, [collection.passages[i] for i in found.ids], **fusion, **scores)
            rankings[query_id] = [found.ids[passage.index] for passage in ranked]
        return ndcg_at_10(collection.qrels, rankings)

    first = ndcg_at_10(collection.qrels, {q: found.ids for q, found in candidates.items()})
    alone = values()
    assert report.first_stage_ndcg == pytest.approx(statistics.fmean(first.values()))
    assert report.reranker_ndcg == pytest.approx(statistics.fmean(alone.values()))
    assert report.first_stage_ndcg != report.reranker_ndcg
    assert [(o.method, o.weight) for o in report.orders] == [
        (m, w) for m in ("z_score", "reciprocal_rank") for w in (0, 0.3, 1)
    ]
    for fused in report.orders:
        expected = values(fusion=fused.method, fusion_weight=fused.weight)
        assert fused.ndcg == pytest.approx(statistics.fmean(expected.values()))
        for difference, baseline in ((fused.to_first_stage, first), (fused.to_reranker, alone)):
            [own] = mean_differences([[expected[q] - baseline[q] for q in expected]], seed=5)
            assert (difference.mean, difference.low, difference.high) == pytest.approx((own.mean, own.low, own.high))


def test_the_ends_of_the_scale_are_the_stages(report):
    for fused in report.orders:
        if fused.weight == 1:
            assert (fused.to_reranker.mean, fused.to_reranker.low, fused.to_reranker.high) == (0, 0, 0)
        if fused.weight == 0 and fused.method == "reciprocal_rank":
            assert (fused.to_first_stage.mean, fused.to_first_stage.low, fused.to_first_stage.high) == (0, 0, 0)


def test_every_candidate_is_scored_once(collection, make_reranker):
    """Whatever number of methods and weights."""
    reranker = make_reranker(cache_bytes=0)
    compare_fusions(reranker, collection, top_k=3, n_queries=2)
    assert reranker.stats.passages_scored == 6


@pytest.mark.parametrize(
    ("weights", "message"), [([], "weights must name one at least"), ([0.5, 1.5], "fusion_weight must be .* but got 1.5")]
)
def test_bad_weights_are_refused_before_any_work(collection, make_reranker, weights, message):
    reranker = make_reranker()
    with pytest.raises(SettingsError, match=message):
        compare_fusions(reranker, collection, weights=weights)
    assert reranker.stats.passages_encoded == 0


def test_the_command_prints_a_table_and_json(collection, tiny_checkpoint, tmp_path):
    folder = write_collection(collection, tmp_path / "words")
    ask = ["eval", "fusion", str(folder), "--model", str(tiny_checkpoint), "--weights", "0.4", "--top-k", "4", "--ratio", "2"]
    result = CliRunner().invoke(app, ask)
    assert result.exit_code == 0, result.output
    assert "words: 8 queries, the 4 best of bm25, r=2" in result.stdout
    assert "reciprocal_rank" in result.stdout
    [measured] = json.loads(CliRunner().invoke(app, [*ask, "--json"]).stdout)["collections"]
    assert [o["method"] for o in measured["orders"]] == ["z_score", "reciprocal_rank"]
    assert measured["ratio"] == 2
    refused = CliRunner().invoke(app, [*ask[:-4], "--weights", "half"])
    assert refused.exit_code == 2
    assert "must be numbers from 0 to 1 such as 0.4,0.6, but got 'half'" in refused.stderr


def test_the_command_s_default_weights_are_the_function_s():
    assert ",".join(map(str, WEIGHTS)) in CliRunner().invoke(app, ["eval", "fusion", "--help"]).stdout.replace("\n", "")
