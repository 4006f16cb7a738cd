"""Collections, the first stage, the measures, and the report that compares orders."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest

from kalm_integrations import EncodedPassage, KalmReranker
from kalm_integrations.core.ranking import fuse
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.bm25 import BM25
from kalm_integrations.corpora.runs import read_run, write_run
from kalm_integrations.errors import SettingsError
from kalm_integrations.evaluation.candidates import encode_candidates, find_candidates, score_settings
from kalm_integrations.evaluation.metrics import bootstrap_interval, bootstrap_intervals, kendall_tau, measure, ndcg_at_10
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


def test_measures_are_those_asked_for() -> None:
    """By name and query; the first relevant passage at rank 2 of 3."""
    values = measure({"q": {"x": 1, "y": 1}}, {"q": ["z", "x", "w"]}, ["RR@10", "R@3", "P@2"])
    assert values == {"RR@10": {"q": 0.5}, "R@3": {"q": 0.5}, "P@2": {"q": 0.5}}


def test_bootstrap_interval_is_that_of_a_mean() -> None:
    draw = random.Random(1)
    differences = [draw.gauss(0.1, 0.5) for _ in range(400)]
    low, high = bootstrap_interval(differences, seed=3)
    assert (low, high) == bootstrap_interval(differences, seed=3) != bootstrap_interval(differences, seed=4)
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(400)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)
    assert bootstrap_interval([0.25] * 10) == (0.25, 0.25)
    assert bootstrap_intervals([differences, [0.25] * 400], seed=3) == [pytest.approx((low, high), abs=0.02), (0.25, 0.25)]


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
    assert [(s.ratio, s.codec) for s in systems[::2]] == [(1, "fp32"), (1, "int4"), (32, "fp32"), (32, "int4")]
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


def test_kendall_tau() -> None:
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / (2 * 3) ** 0.5)
    assert kendall_tau([1, 1], [1, 2]) == 1, "nothing is ordered, so nothing is disputed"


def test_query_sample_depends_on_the_seed_only(collection: Collection) -> None:
    def draw(seed: int, n_queries: int | None) -> list[str]:
        return list(find_candidates(collection, top_k=3, n_queries=n_queries, seed=seed))

    assert draw(0, 2) == draw(0, 2)
    assert len({tuple(draw(seed, 2)) for seed in range(5)}) > 1
    assert draw(0, 100) == draw(1, None) == sorted(collection.queries)


def test_query_is_not_its_own_candidate() -> None:
    """As in BEIR, where queries of some collections are passages of the corpus."""
    passages = {"a": "wing drag", "b": "wing lift", "c": "bowl"}
    [found] = find_candidates(Collection("own", passages, {"a": "wing drag"}, {"a": {"b": 1}}), top_k=2).values()
    assert found.ids == ["b", "c"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": [3]}, "ratios must be multiples of the reranker's compression_ratio=2, but got 3"),
        ({"ratios": [0]}, "but got 0"),
        ({"ratios": []}, "ratios and codecs must each name one at least"),
        ({"codecs": ["zip"]}, "storage_codec must be one of"),
        ({"top_k": 0}, "top_k must be at least 1, but got 0"),
        ({"n_queries": 0}, "n_queries must be at least 1, but got 0"),
        ({"measures": []}, "measures must name one at least"),
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


def test_run_files_keep_the_order(tmp_path: Path, collection: Collection, reranker: KalmReranker) -> None:
    """What is written is read again, every order of a report is written, and a run is a first stage."""
    rankings = {"a": ["x", "y", "z"], "b": ["z"]}
    write_run(tmp_path / "run.trec", "a tag", rankings)
    assert {q: [i for i, _ in found] for q, found in read_run(tmp_path / "run.trec").items()} == rankings
    assert (tmp_path / "run.trec").read_text().splitlines()[1] == "a Q0 y 2 1 a_tag"
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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q0 Q0 p0 1 2.5", r"run:1: a line of a run must be 'query Q0 passage rank score tag', but got 'q0 Q0 p0 1 2.5'"),
        ("q0 Q0 p0 1 nan t", "a score in a run must be a finite number, but got nan"),
        ("q0 Q0 p0 1 2 t\nq0 Q0 p0 2 1 t", r"run:2: .* p0 comes twice for q0"),
        ("q0 Q0 p99 1 2 t", "must be a run on words for all judged queries, but names p99, which is no passage"),
        ("q1 Q0 p1 1 2 t", "but has no passage for query q0"),
    ],
)
def test_runs_that_do_not_fit_are_refused(tmp_path: Path, collection: Collection, line: str, message: str) -> None:
    path = tmp_path / "run"
    path.write_text(line)
    with pytest.raises(SettingsError, match=message):
        find_candidates(collection, str(path))
