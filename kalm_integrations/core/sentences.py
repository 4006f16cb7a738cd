"""A text's sentences, and what stands for them where a text has none. Pure functions without torch.

Sentences are found by Wikimedia's `sentencex`, which knows abbreviations and the full stops of many scripts. Code, tables and
scripts without full stops (Thai) come out of it as one piece. What is longer than a sentence is cut into windows of tokens.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise

from sentencex import segment

from kalm_integrations.core.text import Range, without_blanks

LONGEST_SENTENCE = 128
"""Tokens of a sentence at most; a longer piece is cut into windows."""

WINDOW_TOKENS = 64
"""Tokens of a window at most."""


def divide(text: str, offsets: Sequence[Range]) -> list[Range]:
    """Return the sentences of a text, or windows where it has none, without the blanks around them.

    Args:
        text: without surrogates.
        offsets: of the tokens that were read of it, in order. What is behind the last one is left out.

    Returns:
        In order. Every character that is not blank is in one of them, and in one only.
    """
    end = max((offset[1] for offset in offsets), default=0)
    starts = [offset[0] for offset in offsets]
    pieces: list[Range] = []
    for first, stop in pairwise((*sentence_starts(text[:end]), end)):
        pieces += _windows(text, first, stop, starts)
    trimmed = (without_blanks(text, *piece) for piece in pieces)
    return [piece for piece in trimmed if piece[0] < piece[1]]


def sentence_starts(text: str) -> list[int]:
    """Return where the sentences of a text begin, of which each goes on up to the next one."""
    # Nothing is known of the language; the rules for English hold for most that are written with full stops.
    lengths = [len(sentence) for sentence in segment("en", text)]
    return list(accumulate(lengths[:-1], initial=0))


def _windows(text: str, start: int, end: int, starts: Sequence[int]) -> Iterator[Range]:
    """Cut a piece of a text into windows if it is longer than a sentence is."""
    first, stop = bisect_left(starts, start), bisect_left(starts, end)
    if stop - first > LONGEST_SENTENCE:
        while stop - first > WINDOW_TOKENS:
            last = first + WINDOW_TOKENS
            # A character may be several tokens.
            place = best_cut(text, [place for place in starts[last - WINDOW_TOKENS // 2 : last + 1] if place > start])
            if place is None:
                break
            yield start, place
            start, first = place, bisect_left(starts, place)
    yield start, end


def best_cut(text: str, places: Sequence[int]) -> int | None:
    """Return the last of some places that is at a line break, else at a blank, else not before a combining mark.

    Where none is, it is the last one; None if there are no places.
    """
    rules: Sequence[Callable[[int], bool]] = (
        lambda place: "\n" in text[place - 1 : place + 1],
        lambda place: any(map(str.isspace, text[place - 1 : place + 1])),
        lambda place: not any(unicodedata.category(mark).startswith("M") for mark in text[place : place + 1]),
    )
    good = (place for rule in rules for place in reversed(places) if rule(place))
    return next(good, places[-1] if places else None)
