"""The layouts of training data, and what none of them is."""

from __future__ import annotations

from typing import Any

import pytest

from kalm_integrations.errors import SettingsError
from kalm_integrations.training.layouts import Example, read_example

PAIR = Example(query="q", positives=["a"])
TRIPLET = Example(query="q", positives=["a"], negatives=["b"])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"query": "q", "positives": ["a"], "negatives": ["b"]}, TRIPLET),
        ({"query": "q", "pos": ["a"], "neg": ["b"]}, TRIPLET),
        ({"query": "q", "pos": ["a"]}, PAIR),
        (
            {"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [2], "neg_scores": [-1.5], "prompt": "p"},
            Example(
                query="q", positives=["a"], negatives=["b"], positive_scores=[2.0], negative_scores=[-1.5], instruction="p"
            ),
        ),
        ({"anchor": "q", "positive": "a"}, PAIR),
        ({"query": "q", "positive": "a"}, PAIR),
        ({"anchor": "q", "positive": "a", "negative": "b"}, TRIPLET),
        (
            {"query": "q", "positive": "a", "negative_1": "b", "negative_2": None, "negative_10": "c", "instruction": "i"},
            Example(query="q", positives=["a"], negatives=["b", "c"], instruction="i"),
        ),
        ({"query": "q", "passage": "a", "label": 1}, PAIR),
        ({"query": "q", "text": "a", "label": 1.0}, PAIR),
        ({"anchor": "q", "text": "a", "label": True}, PAIR),
        ({"query": "q", "passage": "a", "label": "0"}, Example(query="q", negatives=["a"])),
    ],
)
def test_a_row_says_the_same_in_every_layout(row: dict[str, Any], expected: Example) -> None:
    for is_table in (False, True):
        left_out: set[str] = set()
        assert read_example(row, left_out, is_table=is_table).model_dump() == expected.model_dump()
        assert left_out == set()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": "a"}, "columns of a known layout .*, but has 'question', 'answer'; rename them"),
        ({"sentence1": "q", "sentence2": "a", "label": 1}, "known layout .*, but has 'sentence1', 'sentence2', 'label'"),
        ({"query": "q", "passage": "a", "score": 0.7}, "known layout .*, but has 'query', 'passage', 'score'"),
        ({}, "known layout .*, but has none"),
        ({"anchor": "q", "positive": "a", "label": 0}, "a row with 'positive' says that it is one, but has 'label', too"),
        ({"anchor": "q", "positive": "a", "score": 0.5}, "has 'score', too; drop that column"),
        ({"query": "q", "passage": "a", "label": 2}, "a label must be 0 or 1, but is 2; a score belongs into"),
        ({"query": "q", "passage": "a", "label": None}, "a label must be 0 or 1, but is None"),
        ({"query": "q", "pos": "a"}, "positives: Input should be a valid list"),
        ({"query": "q", "pos": ["a"], "pos_scores": [1.0]}, "positive_scores and negative_scores come together"),
        ({"query": 1, "positive": "a"}, "query: Input should be a valid string, but got 1"),
    ],
)
def test_what_is_no_example_is_refused(row: dict[str, Any], message: str) -> None:
    for is_table in (False, True):
        with pytest.raises(SettingsError, match=message):
            read_example(row, set(), is_table=is_table)


def test_columns_without_a_use_are_told_but_a_misspelt_key_of_our_own_lines_is_an_error() -> None:
    left_out: set[str] = set()
    assert read_example({"anchor": "q", "positive": "a", "id": 3}, left_out) == PAIR
    ours = {"query": "q", "positives": ["a"], "negative": ["b"]}
    assert read_example(ours, left_out, is_table=True) == PAIR
    assert left_out == {"id", "negative"}
    with pytest.raises(SettingsError, match="negative: Extra inputs are not permitted"):
        read_example(ours, set())


def test_nulls_of_a_table_are_blank_or_absent() -> None:
    nulls = {"negatives": None, "instruction": None, "positive_scores": None, "negative_scores": None}
    assert read_example({"query": "q", "positives": ["a"], **nulls}, set(), is_table=True) == PAIR
    assert read_example({"query": "q", "positives": None}, set(), is_table=True) == Example(query="q")
    assert read_example({"anchor": None, "positive": "a"}, set(), is_table=True) == Example(query="", positives=["a"])
    assert read_example({"query": None, "passage": None, "label": 1}, set()) == Example(query="", positives=[""])
