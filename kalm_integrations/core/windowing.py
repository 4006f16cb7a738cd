"""Where the windows of a long passage begin and end.

A window is a passage of its own: it is encoded, and scores, as its text would. It ends at the last sentence end of its last
tenth, else at the best other place there, and the next one begins up to an eighth of a window before that, at a sentence too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from kalm_integrations.core.checkpoint.first_tokens import CHARACTERS_SEARCHED
from kalm_integrations.core.checkpoint.prompts import passage_text
from kalm_integrations.core.checkpoint.tokenization import PromptTokenizer
from kalm_integrations.core.passages.windows import Window, Windows
from kalm_integrations.core.sentences import best_cut, sentence_starts
from kalm_integrations.core.settings import WINDOW_OVERLAP
from kalm_integrations.core.text import Range, without_surrogates

_COST_OF_A_SENTENCE = 10
"""Which part of a window may stay empty for it to end with a sentence."""

_EXPECTED_COST, _EXPECTED_OVERLAP = 32, 10
"""Which parts of a window stay empty, and are repeated, on average; plans are tested against real passages."""

_TEXT_STARTS = len(passage_text(""))
"""Where the passage begins in what the encoder reads."""


@dataclass(frozen=True)
class InWindows:
    """A long passage, ready for the encoder."""

    windows: Windows
    token_ids: list[list[int]]
    """Of each window."""
    is_whole: bool
    """Whether there are windows enough for all of the text."""


class Windower:
    """Divides passages into windows."""

    def __init__(self, tokenizer: PromptTokenizer, max_tokens: int, max_windows: int) -> None:
        """Make windows of `max_tokens` at most, template included, and no more than `max_windows`."""
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._max_windows = max_windows

    def divide(self, text: str) -> InWindows:
        """Return the windows of a passage that fills one at least. Time and memory are bounded by `max_windows`.

        Every character is in a window, but for the blanks at the end and what is behind the last window that is allowed.
        """
        text = without_surrogates(text)
        length = len(text.rstrip()) or len(text)
        windows: list[Window] = []
        token_ids: list[list[int]] = []
        start, end = 0, 0
        while end < length and len(windows) < self._max_windows:
            covered = end
            end, following, ids = self._window(text, start, length)
            if end <= covered:
                # What is repeated took more tokens than before, and left no room for what follows.
                end, following, ids = self._window(text, covered, length)
                start = covered
            windows.append(Window(start, end, len(ids)))
            token_ids.append(ids)
            start = following
        return InWindows(tuple(windows), token_ids, end >= length)

    def _window(self, text: str, start: int, length: int) -> tuple[int, int, list[int]]:
        """Return where a window ends, where the next one begins, and the window's tokens."""
        rest = text[start : min(length, start + CHARACTERS_SEARCHED * self._max_tokens)]
        offsets = passage_offsets(self._tokenizer, rest, self._max_tokens + 1)
        if len(offsets) <= self._max_tokens:
            end, following = len(rest), len(rest)
        else:
            end, following = self._places(rest, offsets[:-1])
        ids = self._ids(rest[:end])
        # What is cut anew may have a token more; a single character that has too many is not read whole.
        while len(ids) > self._max_tokens and end > 1:
            end = following = max(1, min(end - 1, passage_offsets(self._tokenizer, rest[:end], self._max_tokens)[-1][1]))
            ids = self._ids(rest[:end])
        return start + end, start + following, ids[: self._max_tokens]

    def _places(self, rest: str, offsets: Sequence[Range]) -> tuple[int, int]:
        """Return where a window ends that begins with a text and takes no more tokens, and where the next one begins."""
        starts, ends = ([offset[side] for offset in offsets] for side in (0, 1))
        sentences = sentence_starts(rest[: ends[-1]])
        least = starts[len(starts) - len(starts) // _COST_OF_A_SENTENCE]
        end = _last(sentences, least, ends[-1]) or best_cut(rest, [place for place in ends if place > least]) or ends[-1]
        n_tokens = bisect_left(starts, end)
        earliest = starts[max(n_tokens - self._max_tokens // WINDOW_OVERLAP, 0)]
        following = _first(sentences, earliest, end) or best_cut(rest, [p for p in starts if earliest <= p < end])
        return end, following or end

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.passages([passage_text(text)], self._max_tokens + 1)[0]


def expected_windows(n_tokens: int, max_tokens: int, max_windows: int) -> Windows:
    """Return the windows that a passage of so many tokens becomes, on average, without its text: places are in tokens.

    Args:
        n_tokens: of the passage, template included.
        max_tokens: of a window.
        max_windows: of a passage.
    """
    filled, repeated = max_tokens - max_tokens // _EXPECTED_COST, max_tokens // _EXPECTED_OVERLAP
    windows: list[Window] = []
    start = 0
    while len(windows) < max_windows and (not windows or windows[-1].end < n_tokens):
        size = n_tokens - start if n_tokens - start <= max_tokens else filled
        windows.append(Window(start, start + size, size))
        start += size - repeated
    return tuple(windows)


def passage_offsets(tokenizer: PromptTokenizer, text: str, max_tokens: int) -> list[Range]:
    """Return where the first tokens of a passage lie in it; those of the template's prefix are empty, at its start."""
    whole = tokenizer.offsets(passage_text(text), max_tokens)
    return [(max(start - _TEXT_STARTS, 0), max(end - _TEXT_STARTS, 0)) for start, end in whole]


def _last(places: Sequence[int], least: int, most: int) -> int | None:
    """Return the last of rising places between two, or None."""
    return next((place for place in reversed(places) if least <= place <= most), None)


def _first(places: Sequence[int], least: int, end: int) -> int | None:
    """Return the first of rising places from one on and before another, or None."""
    return next((place for place in places if least <= place < end), None)
