"""Spans of a document's own text, and the text without the sentences that score little."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_integrations.core.types import RankedPassage, Span
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting.pruning import (
    DEFAULT_PRUNE_THRESHOLD,
    check_prune_threshold,
    cut_out,
    excerpt,
    kept_ranges,
    odds,
    own_spans,
)

TEXT = "  One fish. Two fish.\nRed fish.\n\nBlue fish. And what was not"
PLACES = [(2, 11), (12, 21), (22, 31), (33, 43)]


def spans(*scores: float) -> list[Span]:
    return [Span(*place, score) for place, score in zip(PLACES, scores, strict=True)]


@st.composite
def divided(draw) -> tuple[str, list[Span]]:
    """A text with blanks and line breaks, and disjoint spans that cover a part of it, in any order."""
    text = draw(st.text(alphabet="ab. \n\r東", min_size=1, max_size=30))
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), min_size=2, max_size=8)))
    scores = draw(st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0]), min_size=len(cuts) - 1, max_size=len(cuts) - 1))
    found = own_spans(text, text, map(Span, cuts, cuts[1:], scores))
    return text, draw(st.permutations(found))


@given(divided(), st.floats(0, 1))
def test_what_is_left_are_the_original_s_parts_in_order(example, threshold):
    text, found = example
    kept = kept_ranges(text, found, threshold)
    assert all(start < end for start, end in kept)
    assert all(before[1] < after[0] for before, after in pairwise(kept))
    assert not kept or (kept[0][0] >= 0 and kept[-1][1] <= len(text))
    pruned = cut_out(text, kept)
    # One character between two parts, and so every place in the one text is known in the other.
    place = 0
    for (start, end), after in zip(kept, [*kept[1:], None], strict=True):
        assert pruned[place : place + end - start] == text[start:end]
        place += end - start
        if after is not None:
            between = text[end : after[0]]
            assert pruned[place] == ("\n" if "\n" in between or "\r" in between else " ")
            place += 1
    assert place == len(pruned)


@given(divided(), st.floats(0, 1))
def test_a_sentence_is_left_if_its_odds_are_near_the_best_one_s(example, threshold):
    text, found = example
    kept = kept_ranges(text, found, threshold)
    best = max((odds(span.score) for span in found), default=0)
    for span in found:
        is_left = any(start <= span.start and span.end <= end for start, end in kept)
        is_gone = all(end <= span.start or span.end <= start for start, end in kept)
        assert (is_left, is_gone) == ((True, False) if odds(span.score) >= threshold * best else (False, True))


@given(divided())
def test_a_text_of_which_nothing_is_taken_stays_as_it_is(example):
    text, found = example
    assert kept_ranges(text, found, 0) == [(0, len(text))]
    assert cut_out(text, [(0, len(text))]) == text


@pytest.mark.parametrize(
    ("scores", "pruned"),
    [
        ((0.9, 0.9, 0.9, 0.9), TEXT),
        ((0.9, 0.9, 0.1, 0.1), "  One fish. Two fish.\nAnd what was not"),
        ((0.9, 0.1, 0.1, 0.9), "  One fish.\nBlue fish. And what was not"),
        ((0.1, 0.9, 0.9, 0.1), "Two fish.\nRed fish.\nAnd what was not"),
        ((0.1, 0.1, 0.1, 0.9), "Blue fish. And what was not"),
        # The best one is left in any case.
        ((0.1, 0.2, 0.1, 0.1), "Two fish.\nAnd what was not"),
    ],
)
def test_blanks_and_what_was_not_read(scores, pruned):
    assert cut_out(TEXT, kept_ranges(TEXT, spans(*scores), 0.5)) == pruned


def test_blanks_at_the_end_go_with_the_last_sentence():
    text = "One fish. Two fish. \n"
    found = [Span(0, 9, 0.9), Span(10, 19, 0.1)]
    assert kept_ranges(text, found, 0.5) == [(0, 9)]
    assert kept_ranges(text, [Span(0, 9, 0.1), Span(10, 19, 0.9)], 0.5) == [(10, len(text))]


@pytest.mark.parametrize(("text", "kept"), [("", []), (" \n", [(0, 2)]), ("text", [(0, 4)])])
def test_without_spans_nothing_is_taken(text, kept):
    assert kept_ranges(text, [], 0.5) == kept
    assert cut_out(text, kept) == text


@pytest.mark.parametrize(
    ("judged", "own", "expected"),
    [
        ("One fish. Two fish.", "One fish. Two fish.", [(0, 9), (10, 19)]),
        # Metadata in front: outside is left out, what reaches over is clipped.
        ("One fish. Two fish.", "Two fish.", [(0, 9)]),
        ("One fish. Two fish.", "fish. Two fish.", [(0, 5), (6, 15)]),
        ("One fish. Two fish.", " fish. Two", [(1, 6), (7, 10)]),
        # A template has taken the blanks away.
        ("One fish. Two fish.", "\nTwo fish. \n", [(1, 10)]),
        ("One fish. Two fish.", "fish.", [(0, 5)]),
        ("One fish. Two fish.", "Red fish.", []),
        ("One fish. Two fish.", " ", []),
        ("", "One fish.", []),
    ],
)
def test_spans_of_the_own_text(judged, own, expected):
    found = own_spans(own, judged, [Span(0, 9, 0.9), Span(10, 19, 0.1)])
    assert [(span.start, span.end) for span in found] == expected


def ranked(text: str | None, found: list[Span] | None, score: float = 0.5) -> RankedPassage:
    return RankedPassage(0, score, score, None, text, None if found is None else tuple(found))


def test_an_excerpt_has_what_was_asked_for():
    found = [Span(10, 19, 0.9), Span(0, 9, 0.1)]
    text = "One fish. Two fish."
    told = {"relevant_spans": [{"start": 10, "end": 19, "score": 0.9}, {"start": 0, "end": 9, "score": 0.1}]}
    kept = {"kept_spans": [{"start": 10, "end": 19}]}
    both = excerpt(text, ranked(text, found), highlight=True, threshold=0.5)
    assert (both.metadata, both.text) == (told | kept, "Two fish.")
    only_told = excerpt(text, ranked(text, found), highlight=True, threshold=None)
    assert (only_told.metadata, only_told.text) == (told, None)
    whole = excerpt(text, ranked(text, found), highlight=False, threshold=0.01)
    assert (whole.metadata, whole.text) == ({"kept_spans": [{"start": 0, "end": 19}]}, None)
    nothing = excerpt(text, ranked(text, None), highlight=False, threshold=None)
    assert (nothing.metadata, nothing.text) == ({}, None)


def test_an_excerpt_of_what_was_not_judged_is_the_whole():
    found = [Span(0, 9, 0.9)]
    elsewhere = excerpt("Red fish.", ranked("One fish.", found), highlight=True, threshold=0.5)
    assert (elsewhere.metadata, elsewhere.text) == ({"relevant_spans": [], "kept_spans": [{"start": 0, "end": 9}]}, None)
    unscored = excerpt("One fish.", ranked("One fish.", None, float("nan")), highlight=True, threshold=0.5)
    assert (unscored.metadata, unscored.text) == ({}, None)


WINDOWED = "Old fish. One fish.\nTwo fish. Red fish. Blue fish."


@pytest.mark.parametrize(
    ("own", "metadata", "pruned"),
    [
        (WINDOWED, {"start": 10, "end": 39}, "Two fish."),
        # Of the window, what the document's own text has.
        ("fish.\nTwo fish. Red fish. Blue fish.", {"start": 0, "end": 25}, "Two fish."),
        ("  Two fish. Red", {"start": 2, "end": 15}, "Two fish."),
        # It lies in the metadata: nothing is known of the text.
        ("Blue fish.", None, "Blue fish."),
        ("Another text.", None, "Another text."),
    ],
)
def test_of_a_text_in_windows_the_best_one_is_told_and_left(own, metadata, pruned):
    found = (Span(20, 29, 0.9), Span(30, 39, 0.2), Span(10, 19, 0.1))
    place = RankedPassage(0, 0.5, 0.5, text=WINDOWED, spans=found, window=(10, 40))
    told = excerpt(own, place, highlight=True, threshold=0.5)
    assert told.metadata.get("relevant_window") == metadata
    assert (own if told.text is None else told.text) == pruned
    assert "relevant_window" not in excerpt(own, place, highlight=False, threshold=0.5).metadata
    assert excerpt(own, place, highlight=True, threshold=None).text is None


@given(divided(), st.floats(0, 1), st.data())
def test_the_rule_holds_inside_a_window(example, threshold, data):
    text, found = example
    start = data.draw(st.integers(0, min((span.start for span in found), default=len(text))))
    end = data.draw(st.integers(max((span.end for span in found), default=start), len(text)))
    shifted = [Span(span.start - start, span.end - start, span.score) for span in found]
    within = kept_ranges(text[start:end], shifted, threshold)
    assert kept_ranges(text, found, threshold, (start, end)) == [(start + first, start + stop) for first, stop in within]


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan"), "0.5", True, [0.5]])
def test_a_threshold_is_a_number_from_0_to_1(threshold):
    with pytest.raises(SettingsError, match="prune_threshold must be a number from 0"):
        check_prune_threshold(threshold)


def test_a_threshold_may_be_left_out():
    assert check_prune_threshold(None) is None
    assert check_prune_threshold(0) == 0.0
    assert 0 < DEFAULT_PRUNE_THRESHOLD < 1
