"""The report that compares orders of the same candidates."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest
from sentence_transformers import CrossEncoder, SentenceTransformer
from tools.corpora import draw_collection

from kalm_integrations import EncodedPassage, KalmReranker
from kalm_integrations.core.checkpoint.locate import BUILT_IN
from kalm_integrations.core.ranking import fuse
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.bm25 import BM25
from kalm_integrations.corpora.first_stage import find_candidates
from kalm_integrations.corpora.measures import ndcg_at_10
from kalm_integrations.corpora.runs import write_run
from kalm_integrations.errors import SettingsError
from kalm_integrations.evaluation.differences import Difference, mean_differences
from kalm_integrations.evaluation.report import Report, evaluate
from kalm_integrations.evaluation.scoring import encode_candidates, score_settings


@pytest.fixture(scope="module")
def collection() -> Collection:
    return draw_collection(n_queries=30)


@pytest.fixture(scope="module")
def reranker(tiny_checkpoint: Path) -> KalmReranker:
    return KalmReranker.from_pretrained(tiny_checkpoint, compression_ratio=1, storage_codec="fp32")


@pytest.fixture(scope="module")
def report(collection: Collection, reranker: KalmReranker) -> Report:
    return evaluate(reranker, collection, ratios=[1, 32], codecs=["fp32", "rot2"], top_k=5)


def test_report_has_the_orders_that_ranking_gives(
    collection: Collection, report: Report, make_reranker: Callable[..., KalmReranker]
) -> None:
    """The first stage's, the reranker's at each ratio and codec, and the sum's, worked out here from stored encodings."""
    ids = list(collection.passages)
    found = BM25(list(collection.passages.values())).search(list(collection.queries.values()), 5)
    candidates = {q: [ids[i] for i in indices] for q, (indices, _) in zip(collection.queries, found, strict=True)}
    scores = {q: scores for q, (_, scores) in zip(collection.queries, found, strict=True)}
    baseline = ndcg_at_10(collection.qrels, candidates)
    first, *systems = report.systems
    assert (first.name, first.means, first.differences) == ("bm25", {"nDCG@10": pytest.approx(fmean(baseline.values()))}, {})
    assert [(s.ratio, s.codec) for s in systems[::2]] == [(1, "fp32"), (1, "rot2"), (32, "fp32"), (32, "rot2")]
    orders = set()
    for alone, summed in zip(systems[::2], systems[1::2], strict=True):
        reranker = make_reranker(compression_ratio=alone.ratio, storage_codec=alone.codec)
        stored = [metadata["kalm_encoding"] for metadata in reranker.encode_to_metadata(list(collection.passages.values()))]
        encodings = dict(zip(ids, map(EncodedPassage.from_metadata, stored), strict=True))
        reranked, fused = {}, {}
        for query_id, query in collection.queries.items():
            ranked = reranker.rank(query, [encodings[i] for i in candidates[query_id]])
            total = fuse([p.margin for p in sorted(ranked, key=lambda p: p.index)], scores[query_id], "z_score")
            reranked[query_id] = [candidates[query_id][p.index] for p in ranked]
            fused[query_id] = [i for _, i in sorted(zip(total, candidates[query_id], strict=True), key=lambda p: -p[0])]
        for system, rankings in ((alone, reranked), (summed, fused)):
            values = ndcg_at_10(collection.qrels, rankings)
            assert system.means["nDCG@10"] == pytest.approx(fmean(values.values()))
            difference = system.differences["bm25"]
            assert difference.mean == pytest.approx(fmean(values.values()) - fmean(baseline.values()))
            assert difference.low <= difference.mean <= difference.high
        orders.add(json.dumps(reranked))
    assert len(orders) == 4, "ratios and codecs must show in the orders, or this test tells nothing"


def test_peers_order_the_same_candidates_by_their_own_scores(
    collection: Collection, cross_encoder: str, bi_encoder: str, make_reranker: Callable[..., KalmReranker]
) -> None:
    """Each is measured like the reranker, and is a baseline with a paired interval for all others."""
    report = evaluate(
        make_reranker(),
        collection,
        ratios=[4],
        codecs=["fp32"],
        cross_encoders=[cross_encoder],
        bi_encoders=[bi_encoder],
        top_k=6,
        seed=2,
    )
    candidates = find_candidates(collection, top_k=6)
    scorer, encoder = CrossEncoder(cross_encoder), SentenceTransformer(bi_encoder)
    values = {"bm25": ndcg_at_10(collection.qrels, {q: found.ids for q, found in candidates.items()})}
    for name in ("cross-encoder", "bi-encoder"):
        rankings = {}
        for query_id, found in candidates.items():
            texts = [collection.passages[i] for i in found.ids]
            if name == "cross-encoder":
                scores = [float(s) for s in scorer.predict([(found.query, text) for text in texts])]
            else:
                scores = encoder.similarity(encoder.encode([found.query]), encoder.encode(texts))[0].tolist()
            rankings[query_id] = [i for _, i in sorted(zip(scores, found.ids, strict=True), key=lambda pair: -pair[0])]
        values[name] = ndcg_at_10(collection.qrels, rankings)
    systems = {system.name: system for system in report.systems}
    assert list(systems) == ["bm25", "cross-encoder", "bi-encoder", "reranked r4 fp32", "+ bm25 r4 fp32"]
    for name, by_query in values.items():
        assert systems[name].means["nDCG@10"] == pytest.approx(sum(by_query.values()) / len(by_query))
    difference = systems["bi-encoder"].differences["cross-encoder"]
    gains = [values["bi-encoder"][q] - values["cross-encoder"][q] for q in candidates]
    [expected] = mean_differences([gains], seed=2)
    assert (difference.mean, difference.low, difference.high) == pytest.approx(
        (expected.mean, expected.low, expected.high), abs=0.05
    )
    assert set(systems["reranked r4 fp32"].differences) == {"bm25", "cross-encoder", "bi-encoder"}


def test_several_rerankers_are_compared_with_the_first_at_the_same_setting(
    tmp_path: Path, tiny_checkpoint: Path, collection: Collection, report: Report
) -> None:
    """On the same candidates; each has the orders that it has alone. One is in memory at a time."""
    # A copy, whose weights no other reranker of this process holds.
    copied = shutil.copytree(tiny_checkpoint, tmp_path / "tiny")
    pico_folder = shutil.copytree(BUILT_IN / "pico", tmp_path / "pico")
    n_open, most = 0, 0

    def opener(model: str | Path) -> Callable[[], KalmReranker]:
        def open_reranker() -> KalmReranker:
            nonlocal n_open, most
            settings = {"compression_ratio": 1, "storage_codec": "fp32"}
            opened = KalmReranker.from_pretrained(model, **settings)
            n_open += 1
            most = max(most, n_open)
            weakref.finalize(opened.runtime, closed)
            return opened

        return open_reranker

    def closed() -> None:
        nonlocal n_open
        n_open -= 1

    options = {"ratios": [1, 32], "codecs": ["fp32", "rot2"], "top_k": 5}
    openers = {"tiny": opener(copied), "pico": opener(pico_folder)}
    compared = evaluate(openers, collection, **options)
    assert (n_open, most) == (0, 1)
    pico = evaluate(openers["pico"](), collection, **options)
    first, *others = compared.systems
    assert first == report.systems[0]
    tiny_systems, pico_systems = others[:8], others[8:]
    settings = [f"{name} {s}" for s in ("r1 fp32", "r1 rot2", "r32 fp32", "r32 rot2") for name in ("", "+ bm25")]
    assert [s.name for s in others] == [
        " ".join(f"{label} {setting}".split()) for label in ("tiny", "pico") for setting in settings
    ]
    for own, single in ((tiny_systems, report.systems[1:]), (pico_systems, pico.systems[1:])):
        assert [s.means for s in own] == [s.means for s in single]
        assert [s.differences for s in own] == [s.differences for s in single]
    assert {s.model for s in tiny_systems} == {"tiny"}
    assert all(s.to_first_model is None for s in [first, *tiny_systems, *pico.systems])
    for base, other in zip(tiny_systems, pico_systems, strict=True):
        assert other.to_first_model is not None
        assert other.to_first_model.mean == pytest.approx(other.means["nDCG@10"] - base.means["nDCG@10"])
        assert other.to_first_model.low < other.to_first_model.high
    assert compared.to_table().columns[-1].header == "to tiny"
    with pytest.raises(SettingsError, match="there must be a reranker at least"):
        evaluate({}, collection, **options)


def test_differences_to_the_first_reranker_are_paired(
    collection: Collection, make_reranker: Callable[..., KalmReranker]
) -> None:
    """One that orders as the first does differs by nothing, with certainty."""
    openers = {label: lambda: make_reranker(storage_codec="fp32") for label in ("a", "b")}
    report = evaluate(openers, collection, ratios=[4], codecs=["fp32"], top_k=5)
    assert [s.to_first_model for s in report.systems[3:]] == [Difference(0, 0, 0)] * 2


def test_another_run_is_measured_with_its_own_passages(
    tmp_path: Path, collection: Collection, make_reranker: Callable[..., KalmReranker]
) -> None:
    """Whatever the first stage found; every order is compared with it."""
    best = {q: sorted(grades, key=lambda i: -grades[i]) for q, grades in collection.qrels.items()}
    write_run(tmp_path / "words.best.trec", "best", best)
    run = str(tmp_path / "{collection}.best.trec")
    report = evaluate(make_reranker(), collection, ratios=[4], codecs=["rot4"], other_runs=[run], top_k=2)
    system = report.systems[1]
    assert system.name == "{collection}.best.trec"
    assert system.means == {"nDCG@10": 1}
    assert report.systems[0].means["nDCG@10"] < 1
    difference = report.systems[0].differences[system.name]
    assert difference.mean == pytest.approx(report.systems[0].means["nDCG@10"] - 1)
    assert all(set(s.differences) == {"bm25", system.name} for s in report.systems[2:])
    with pytest.raises(SettingsError, match=r"a run to compare with must be a TREC run file, but 'no\.trec' is none"):
        evaluate(make_reranker(), collection, ratios=[4], codecs=["rot4"], other_runs=["no.trec"])


def test_candidates_are_encoded_once(collection: Collection, make_reranker: Callable[..., KalmReranker]) -> None:
    """Whatever number of queries, ratios and codecs; passages that are no candidate are not encoded at all."""
    reranker = make_reranker(compression_ratio=2)
    report = evaluate(reranker, collection, ratios=[2, 4, 4], codecs=["fp16", "int8"], top_k=2, n_queries=3)
    assert len(report.systems) == 1 + 4 * 2
    assert reranker.stats.passages_encoded == report.n_passages <= 6
    assert reranker.stats.passages_scored == 4 * 3 * 2


def test_stored_size_is_that_of_the_metadata(
    collection: Collection, reranker: KalmReranker, make_reranker: Callable[..., KalmReranker]
) -> None:
    candidates = find_candidates(collection, top_k=3)
    encoded = encode_candidates(reranker, collection, candidates)
    for scored in score_settings(reranker, candidates, encoded, [1, 4], ["fp32", "int8"]):
        stored = make_reranker(compression_ratio=scored.ratio, storage_codec=scored.codec).encode_to_metadata(
            [collection.passages[i] for i in encoded]
        )
        assert scored.mean_bytes == pytest.approx(fmean(len(metadata["kalm_encoding"]) for metadata in stored))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": [3]}, "ratios must be multiples of the reranker's compression_ratio=2, but got 3"),
        ({"ratios": [0]}, "but got 0"),
        ({"ratios": []}, "ratios and codecs must each name one at least"),
        ({"codecs": ["zip"]}, "storage_codec must be one of"),
        ({"top_k": 0}, "top_k must be at least 1, but got 0"),
        ({"n_queries": 0}, "n_queries must be at least 1, but got 0"),
        ({"measures": ["nDCG@ten"]}, "a measure must be one of ir-measures, .* but got 'nDCG@ten'"),
    ],
)
def test_evaluate_refuses_bad_arguments(
    collection: Collection, make_reranker: Callable[..., KalmReranker], options: dict[str, object], message: str
) -> None:
    reranker = make_reranker(compression_ratio=2)
    with pytest.raises(SettingsError, match=message):
        evaluate(reranker, collection, **{"ratios": [4], "codecs": ["fp16"], **options})
    assert reranker.stats.passages_encoded == 0


@pytest.mark.parametrize("empty", [Collection("x", {}, {"q": "a"}, {"q": {"p": 1}}), Collection("x", {"p": "a"}, {}, {})])
def test_evaluate_refuses_an_empty_collection(reranker: KalmReranker, empty: Collection) -> None:
    with pytest.raises(SettingsError, match="must have passages and judged queries, but x has"):
        evaluate(reranker, empty, ratios=[1], codecs=["fp16"])


def test_orders_are_written_and_a_run_is_a_first_stage(tmp_path: Path, collection: Collection, reranker: KalmReranker) -> None:
    options = {"ratios": [1], "codecs": ["fp16"], "top_k": 4}
    first = evaluate(reranker, collection, **options, run_folder=tmp_path / "runs")
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "words.bm25.trec",
        "words.reranked-r1-fp16.trec",
        "words.plus-bm25-r1-fp16.trec",
    }
    again = evaluate(reranker, collection, **options, first_stage=str(tmp_path / "runs" / "{collection}.bm25.trec"))
    assert [s.means for s in again.systems[:2]] == [s.means for s in first.systems[:2]]
    reversed_run = find_candidates(collection, str(tmp_path / "runs" / "words.reranked-r1-fp16.trec"), top_k=4)
    assert {q: sorted(found.ids) for q, found in reversed_run.items()} == {
        q: sorted(found.ids) for q, found in find_candidates(collection, top_k=4).items()
    }
