"""What of a file is ranked for a question."""

from __future__ import annotations

TEXTS = ["the Rhine", "otters eat crabs", "", "crabs, crabs, crabs", "otters swim"]


def test_few_passages_are_all_ranked_in_the_order_of_the_file(make_collection):
    collection = make_collection(TEXTS, 5)
    names, passages = collection.choose("crabs")
    assert [passage.text for passage in passages] == TEXTS
    assert names == ["line 1", "line 2", "line 3", "line 4", "line 5"]
    assert (len(collection), collection.first_stage) == (5, None)


def test_of_many_bm25_chooses(make_collection):
    collection = make_collection(TEXTS, 2)
    assert collection.first_stage == "BM25"
    assert [passage.text for passage in collection.choose("which crabs?")[1]] == [TEXTS[3], TEXTS[1]]
    assert [passage.text for passage in collection.choose("otters")[1]] == [TEXTS[4], TEXTS[1]]


def test_a_question_without_a_known_word_keeps_the_order_of_the_file(make_collection):
    for query in ("the", "zebra", "…"):
        assert make_collection(TEXTS, 2).choose(query)[0] == ["line 1", "line 2"]


def test_rows_are_called_by_their_id_and_bring_their_encoding(make_collection):
    names, [passage] = make_collection([{"_id": "p7", "text": "otters", "kalm_encoding": "kalm1.x"}]).choose("otters")
    assert names == ["p7"]
    assert (passage.text, passage.encoding) == ("otters", "kalm1.x")
