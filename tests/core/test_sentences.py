"""Sentences, and windows where there are none."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_integrations.core.sentences import LONGEST_SENTENCE, WINDOW_TOKENS, divide
from kalm_integrations.core.text import positions_in, without_surrogates


def tokens(text: str) -> list[tuple[int, int]]:
    """Return where words lie, with the blank before them, as in a tokenizer of byte-pair encoding."""
    return [match.span() for match in re.finditer(r"\s?\w+|\s*\W", text)]


def pieces(text: str) -> list[str]:
    return [text[start:end] for start, end in divide(text, tokens(text))]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Dr. Smith has left. Where to?  Nobody knows!", ["Dr. Smith has left.", "Where to?", "Nobody knows!"]),
        ("It cost 3.14 dollars. \n\nA heading\n\nThe end.", ["It cost 3.14 dollars.", "A heading", "The end."]),
        ("東京は日本の首都です。人口は約1400万人です。", ["東京は日本の首都です。", "人口は約1400万人です。"]),
        ("这是第一句。这是第二句。", ["这是第一句。", "这是第二句。"]),
        ("no full stop", ["no full stop"]),
        ("", []),
        (" \n\t ", []),
    ],
)
def test_sentences_are_found_in_several_scripts(text, sentences):
    assert pieces(text) == sentences


def test_a_long_table_is_cut_at_its_lines():
    text = "\n".join(f"| row {number} | {number * 7} |" for number in range(100))
    found = pieces(text)
    assert len(found) > 5
    assert all(piece.startswith("| row") and piece.endswith("|") for piece in found)


def test_long_text_without_full_stops_is_cut_at_its_blanks():
    words = [f"word{number}" for number in range(1000)]
    found = pieces(" ".join(words))
    assert " ".join(found).split() == words
    assert max(len(piece.split()) for piece in found) <= WINDOW_TOKENS


def test_text_without_blanks_is_cut_between_tokens_and_never_before_a_combining_mark():
    text = "\u0e01\u0e31" * 400  # a Thai letter and the vowel above it
    places = [(index, index + 1) for index in range(len(text))]
    found = [text[start:end] for start, end in divide(text, places)]
    assert "".join(found) == text
    assert len(found) >= len(text) // WINDOW_TOKENS
    assert all(piece.startswith("\u0e01") for piece in found)


def test_a_sentence_that_is_not_too_long_stays_whole():
    sentence = " ".join(["word"] * LONGEST_SENTENCE) + "."
    assert len(tokens(sentence)) == LONGEST_SENTENCE + 1
    assert len(pieces(sentence[:-1])) == 1
    assert len(pieces(sentence)) > 1


def test_what_was_not_read_is_in_no_sentence():
    text = "The first sentence. The second one is cut. The third was never read."
    read = tokens(text)[:6]
    assert [text[start:end] for start, end in divide(text, read)] == ["The first sentence.", "The second"]
    assert divide(text, []) == []


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=400))
def test_every_character_that_is_not_blank_is_in_one_sentence(text):
    places = [(index, index + 1) for index in range(len(text))]
    found = divide(text, places)
    assert all(start < end for start, end in found)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(found))
    covered = {index for start, end in found for index in range(start, end)}
    assert covered >= {index for index, character in enumerate(text) if not character.isspace()}


@given(st.text(alphabet=["a", "é", "\ud83d", "\ude00", "\U0001f600"], max_size=12))
def test_positions_lead_from_text_without_surrogates_to_the_text(text):
    clean = without_surrogates(text)
    positions = positions_in(text)
    assert len(positions) == len(clean) + 1
    assert positions[-1] == len(text)
    parts = [text[start:end] for start, end in itertools.pairwise(positions)]
    assert [without_surrogates(part) for part in parts] == list(clean)
