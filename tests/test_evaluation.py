"""Collections, the first stage, the measures, and the report that compares orders."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from kalm_integrations import EncodedPassage, KalmReranker
from kalm_integrations.core.fusion import fuse
from kalm_integrations.errors import SettingsError
from kalm_integrations.evaluation.beir import Collection
from kalm_integrations.evaluation.first_stage import BM25
from kalm_integrations.evaluation.metrics import bootstrap_interval, kendall_tau, ndcg_at_10
from kalm_integrations.evaluation.report import Report, evaluate

WORDS = ["wing", "drag", "lift", "bowl", "team", "league", "jazz", "river", "stone", "glass"]


@pytest.fixture(scope="module")
def collection() -> Collection:
    """Twelve passages of random words, six queries of two words, two random judgements for each."""
    draw = random.Random(0)
    passages = {f"p{i}": " ".join(draw.choices(WORDS, k=8)) for i in range(12)}
    queries = {f"q{i}": " ".join(draw.sample(WORDS, 2)) for i in range(6)}
    qrels = {query_id: dict(zip(draw.sample(list(passages), 2), (1, 2), strict=True)) for query_id in queries}
    return Collection("words", passages, queries, qrels)


@pytest.fixture(scope="module")
def reranker(tiny_checkpoint: Path) -> KalmReranker:
    return KalmReranker.from_pretrained(tiny_checkpoint, compression_ratio=1)


@pytest.fixture(scope="module")
def report(collection: Collection, reranker: KalmReranker) -> Report:
    return evaluate(reranker, collection, ratios=[1, 32], codecs=["fp32", "int4"], top_k=5)


def test_ndcg_has_the_book_s_values() -> None:
    """Gain = grade, discount = log2(rank + 1), by the order that is given, and relevant passages not found count."""
    qrels = {"a": {"x": 1}, "b": {"x": 2, "y": 1, "z": 0}, "c": {"x": 1}, "d": {"x": 1}, "unused": {"x": 1}}
    rankings = {"a": ["z", "x"], "b": ["z", "y", "x"], "c": ["z", "y"], "d": [*map(str, range(10)), "x"]}
    values = ndcg_at_10(qrels, rankings)
    second = 1 / math.log2(3)
    assert list(values) == list(rankings)
    assert values["a"] == pytest.approx(second)
    assert values["b"] == pytest.approx((second + 2 / math.log2(4)) / (2 + second))
    assert (values["c"], values["d"]) == (0, 0)


def test_bootstrap_interval_is_that_of_a_mean() -> None:
    draw = random.Random(1)
    differences = [draw.gauss(0.1, 0.5) for _ in range(400)]
    low, high = bootstrap_interval(differences, seed=3)
    assert (low, high) == bootstrap_interval(differences, seed=3) != bootstrap_interval(differences, seed=4)
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(400)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)
    assert bootstrap_interval([0.25] * 10) == (0.25, 0.25)


def test_report_has_the_orders_that_ranking_gives(
    collection: Collection, report: Report, make_reranker: Callable[..., KalmReranker]
) -> None:
    """The first stage's, the reranker's at each ratio and codec, and the sum's, worked out here from stored encodings."""
    ids = list(collection.passages)
    found = BM25(list(collection.passages.values())).search(list(collection.queries.values()), 5)
    candidates = {q: [ids[i] for i in indices] for q, (indices, _) in zip(collection.queries, found, strict=True)}
    scores = {q: scores for q, (_, scores) in zip(collection.queries, found, strict=True)}
    baseline = ndcg_at_10(collection.qrels, candidates)
    assert report.first_stage_ndcg == pytest.approx(statistics.fmean(baseline.values()))
    assert [(s.ratio, s.codec) for s in report.settings] == [(1, "fp32"), (1, "int4"), (32, "fp32"), (32, "int4")]
    orders = set()
    for setting in report.settings:
        reranker = make_reranker(compression_ratio=setting.ratio, storage_codec=setting.codec)
        stored = [metadata["kalm_encoding"] for metadata in reranker.encode_to_metadata(list(collection.passages.values()))]
        encodings = dict(zip(ids, map(EncodedPassage.from_metadata, stored), strict=True))
        reranked, fused = {}, {}
        for query_id, query in collection.queries.items():
            ranked = reranker.rank(query, [encodings[i] for i in candidates[query_id]])
            total = fuse([p.margin for p in sorted(ranked, key=lambda p: p.index)], scores[query_id], "z_score")
            reranked[query_id] = [candidates[query_id][p.index] for p in ranked]
            fused[query_id] = [i for _, i in sorted(zip(total, candidates[query_id], strict=True), key=lambda p: -p[0])]
        for measured, rankings in ((setting.reranked, reranked), (setting.fused, fused)):
            values = ndcg_at_10(collection.qrels, rankings)
            differences = [values[q] - baseline[q] for q in baseline]
            assert measured.ndcg == pytest.approx(statistics.fmean(values.values()))
            assert measured.difference == pytest.approx(measured.ndcg - report.first_stage_ndcg)
            assert (measured.low, measured.high) == pytest.approx(bootstrap_interval(differences, 0))
        assert setting.mean_characters == pytest.approx(
            statistics.fmean(map(len, (stored[ids.index(i)] for i in used(candidates))))
        )
        orders.add(json.dumps(reranked))
    assert len(orders) == 4, "ratios and codecs must show in the orders, or this test tells nothing"


def used(candidates: dict[str, list[str]]) -> set[str]:
    return {passage_id for ids in candidates.values() for passage_id in ids}


def test_candidates_are_encoded_once(collection: Collection, make_reranker: Callable[..., KalmReranker]) -> None:
    """Whatever number of queries, ratios and codecs; passages that are no candidate are not encoded at all."""
    reranker = make_reranker(compression_ratio=2)
    report = evaluate(reranker, collection, ratios=[2, 4, 4], codecs=["fp16", "int8"], top_k=2, n_queries=3)
    assert len(report.settings) == 4
    assert reranker.stats.passages_encoded == report.n_passages <= 6
    # Each ratio once more with states in float32, for comparison.
    assert reranker.stats.passages_scored == (4 + 2) * 3 * 2


def test_codecs_are_compared_with_float32(collection: Collection, reranker: KalmReranker) -> None:
    """fp32 changes nothing; the fewer bits a codec has, the more it changes."""
    report = evaluate(reranker, collection, ratios=[1], codecs=["fp32", "fp16", "int8", "int4"])
    exact, *lossy = report.settings
    assert (exact.max_score_change, exact.rank_agreement) == (0, 1)
    changes = [setting.max_score_change for setting in lossy]
    assert 0 < changes[0] < changes[1] < changes[2]
    assert all(-1 <= setting.rank_agreement <= 1 for setting in lossy)


def test_kendall_tau() -> None:
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / (2 * 3) ** 0.5)
    assert kendall_tau([1, 1], [1, 2]) == 1, "nothing is ordered, so nothing is disputed"


def test_query_sample_depends_on_the_seed_only(collection: Collection, reranker: KalmReranker) -> None:
    def first_stage(seed: int, n_queries: int | None) -> float:
        options = {"ratios": [64], "codecs": ["fp16"], "top_k": 3, "n_queries": n_queries, "seed": seed}
        report = evaluate(reranker, collection, **options)
        assert report.n_queries == min(n_queries or 6, 6)
        return report.first_stage_ndcg

    assert first_stage(0, 2) == first_stage(0, 2)
    assert len({first_stage(seed, 2) for seed in range(5)}) > 1
    assert first_stage(0, 100) == first_stage(1, None)


def test_query_is_not_its_own_candidate(reranker: KalmReranker) -> None:
    """As in BEIR, where queries of some collections are passages of the corpus."""
    passages = {"a": "wing drag", "b": "wing lift", "c": "bowl"}
    report = evaluate(
        reranker, Collection("own", passages, {"a": "wing drag"}, {"a": {"b": 1}}), ratios=[1], codecs=["fp16"], top_k=2
    )
    assert (report.n_passages, report.first_stage_ndcg) == (2, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": [3]}, "ratios must be multiples of the reranker's compression_ratio=2, but got 3"),
        ({"ratios": [0]}, "but got 0"),
        ({"ratios": []}, "ratios and codecs must each name one at least"),
        ({"codecs": ["zip"]}, "storage_codec must be one of"),
        ({"top_k": 0}, "top_k must be at least 1, but got 0"),
        ({"n_queries": 0}, "n_queries must be at least 1, but got 0"),
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


def test_bm25_finds_words() -> None:
    """Best first, and all passages where there are fewer than asked for."""
    [(indices, scores)] = BM25(["the wing", "drag of a wing", "bowl"]).search(["drag wing"], 10)
    assert indices[0] == 1
    assert sorted(indices) == [0, 1, 2]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("passages", [[], ["the of", ""]])
def test_bm25_refuses_passages_without_words(passages: list[str]) -> None:
    with pytest.raises(SettingsError, match=f"none of {len(passages)} does"):
        BM25(passages)


def write_beir(folder: Path, corpus: str, queries: str, qrels: str) -> Path:
    (folder / "qrels").mkdir()
    (folder / "corpus.jsonl").write_text(corpus, encoding="utf-8")
    (folder / "queries.jsonl").write_text(queries, encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{qrels}", encoding="utf-8")
    return folder


CORPUS, QUERIES = '{"_id": "p", "title": "T", "text": "x"}\n{"_id": "r", "text": "y"}\n', '{"_id": "q", "text": "x?"}\n'


def test_collection_joins_titles_and_keeps_judged_queries(tmp_path: Path) -> None:
    queries = QUERIES + '{"_id": "other", "title": "no", "text": "z"}\n'
    read = Collection.read(write_beir(tmp_path, CORPUS, queries, "q\tp\t2\n"))
    assert read == Collection(tmp_path.name, {"p": "T x", "r": "y"}, {"q": "x?"}, {"q": {"p": 2}})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((CORPUS + "{", QUERIES, ""), r"corpus.jsonl:3: a line must be a JSON object"),
        ((CORPUS, '\n{"_id": 1, "text": "x"}', ""), r"queries.jsonl:2: a line must have a string as '_id', but has 1"),
        ((CORPUS, '{"_id": "q"}', ""), r"queries.jsonl:1: a row must have its passage under 'text'"),
        ((CORPUS, QUERIES, "q\tp\t1\nq\tp\n"), r"test.tsv:3: a line must be query-id, corpus-id and a whole score"),
        ((CORPUS, QUERIES, "q\tp\thigh\n"), r"test.tsv:2: a line must be"),
    ],
)
def test_collection_names_the_malformed_line(tmp_path: Path, files: tuple[str, str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Collection.read(write_beir(tmp_path, *files))


def test_collection_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"a BEIR folder must hold corpus\.jsonl"):
        Collection.read(tmp_path)
    with pytest.raises(SettingsError, match=r"split 'dev' must be a file in .*, but it has: test"):
        Collection.read(write_beir(tmp_path, CORPUS, QUERIES, ""), "dev")
