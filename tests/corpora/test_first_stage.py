"""First stages: candidates by BM25, a bi-encoder and run files."""

from __future__ import annotations

from pathlib import Path

import pytest
from tools.corpora import draw_collection, write_collection

from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.first_stage import find_candidates, without_missing_queries
from kalm_integrations.corpora.measures import ndcg_at_10
from kalm_integrations.corpora.peers import search
from kalm_integrations.corpora.runs import write_run
from kalm_integrations.errors import SettingsError


@pytest.fixture(scope="module")
def collection() -> Collection:
    return draw_collection()


def test_a_bi_encoder_is_a_first_stage(collection: Collection, bi_encoder: str) -> None:
    candidates = find_candidates(collection, bi_encoder, top_k=3)
    run = search(bi_encoder, collection.passages, collection.queries, k=3)
    assert {q: list(zip(found.ids, found.scores, strict=True)) for q, found in candidates.items()} == run
    with pytest.raises(SettingsError, match=r"a bi-encoder must be a folder or a hub id .*, but 'no/where' is not"):
        find_candidates(collection, "no/where")


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


def test_a_passage_that_is_judged_for_the_query_of_its_id_is_a_candidate(tmp_path: Path) -> None:
    """FAQs number questions and answers alike; what nobody judged for the question of its id is left out."""
    answers = {"1": "the wing lifts the plane", "2": "a bowl is round", "3": "the river is long"}
    questions = {"1": "what lifts a wing", "2": "how round is a bowl", "3": "how long is the river"}
    faq = Collection("faq", answers, questions, {"1": {"1": 1}, "2": {"2": 0, "1": 1}, "3": {"1": 1}})
    collection = Collection.read(write_collection(faq, tmp_path / "faq"))
    candidates = find_candidates(collection, top_k=2)
    assert {q: found.ids[0] for q, found in candidates.items()} == {"1": "1", "2": "2", "3": "2"}
    assert sorted(candidates["3"].ids) == ["1", "2"]
    values = ndcg_at_10(collection.qrels, {q: found.ids for q, found in candidates.items()})
    assert values["1"] == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q0 Q0 p99 1 2 t", "must be a run on words, but names p99, which is no passage"),
        (
            "q1 Q0 p1 1 2 t",
            "for all judged queries, but has no passage for 5 of 6, such as q0; leave them out with --skip-missing-queries",
        ),
    ],
)
def test_runs_that_do_not_fit_are_refused(tmp_path: Path, collection: Collection, line: str, message: str) -> None:
    path = tmp_path / "run"
    path.write_text(line)
    with pytest.raises(SettingsError, match=message):
        find_candidates(collection, str(path))


def test_queries_that_a_run_lacks_are_left_out(tmp_path: Path, collection: Collection) -> None:
    """Its candidates are those of the run; what is no run has passages for all queries."""
    rankings = {"q1": ["p3", "p0"], "q4": ["p2"], "x9": ["p1"]}
    write_run(tmp_path / "words.trec", "mine", rankings)
    run = str(tmp_path / "{collection}.trec")
    answered = without_missing_queries(collection, run)
    assert {q: found.ids for q, found in find_candidates(answered, run).items()} == {q: rankings[q] for q in ("q1", "q4")}
    assert without_missing_queries(collection, "bm25") == collection
    write_run(tmp_path / "words.trec", "other", {"x9": ["p1"]})
    with pytest.raises(SettingsError, match=r"for judged queries of words, but has them for none; it names 'x9'"):
        without_missing_queries(collection, run)
    (tmp_path / "words.trec").write_text("")
    with pytest.raises(SettingsError, match="but has them for none; it is empty"):
        without_missing_queries(collection, run)
