"""The first tokens of a text, at the cost of what they need, however long the text is.

Only the start of a long text is tokenised. Its first tokens are those of the whole text if a later boundary between two of
its tokens is one in the whole text too. With byte-pair encoding such a boundary can be seen: where no token of the vocabulary
holds the last character of one token and the first of the next side by side, no merge can cross, whatever follows, and the
merges on one side of such a place do not depend on the other side. In text with spaces nearly every word begins at one.

Normaliser and pre-tokeniser, which come first, look a few characters ahead at most. So the last `SLACK` tokens of a start
prove nothing, and a start never ends before a combining mark, unless there are more than `MAX_MARKS` in a row.

A text without such a boundary (one letter 100,000 times) is read up to `CHARACTERS_READ` characters for each token asked for.
A merge depends on what is further right only through merges that come before it in the vocabulary's list, so to be felt at
the first tokens, what is left out would have to act through a chain of thousands of different merges. Of a text that hardly
has tokens (spaces that the tokenizer drops), no more than `CHARACTERS_SEARCHED` characters for each token are looked at.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from kalm_integrations.core.forks import kept_property

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

FIRST_CHARACTERS = 8
"""Characters for each token asked for that are tokenised first. Shorter texts are tokenised as a whole."""

CHARACTERS_READ = 64
"""Characters for each token asked for after which a start with enough tokens needs no proof."""

CHARACTERS_SEARCHED = 512
"""Characters for each token asked for behind which nothing is read, however few tokens there are."""

SLACK = 64
"""Tokens at the end of a start that may change with what follows."""

MAX_MARKS = 256
"""Combining marks in a row that are kept together; Unicode's stream-safe text has 30 at most."""


class FirstTokens:
    """Tokenises the starts of texts. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer, encode: Callable[[Sequence[str]], list[Encoding]]) -> None:
        """Take a tokenizer, and the function that tokenises whole texts with it."""
        self._tokenizer = tokenizer
        self._encode = encode

    def ids(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Return the first ids of each text: `max_tokens` of them, or all if it has fewer."""
        return [encoding.ids[:max_tokens] for encoding in self._starts(texts, max_tokens)]

    def offsets(self, text: str, max_tokens: int) -> list[tuple[int, int]]:
        """Return where the first tokens of a text begin and end in it: `max_tokens` of them, or all if it has fewer."""
        [encoding] = self._starts([text], max_tokens)
        found: list[tuple[int, int]] = encoding.offsets[:max_tokens]
        return found

    def cut(self, texts: Sequence[str], max_tokens: int) -> list[str]:
        """Return what of each text its first `max_tokens` tokens stand for, or all if it has fewer."""
        encodings = self._starts(texts, max_tokens)
        return [
            text if len(encoding.ids) <= max_tokens else text[: encoding.offsets[max_tokens - 1][1]]
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _starts(self, texts: Sequence[str], max_tokens: int) -> list[Encoding]:
        """Return the tokens of enough of each text to know the first ones."""
        # For a proof there must be tokens behind those that are asked for.
        wanted = max_tokens + SLACK
        starts = [_start(text, FIRST_CHARACTERS * wanted) for text in texts]
        found = []
        for text, start, encoding in zip(texts, starts, self._encode(starts), strict=True):
            per_token = FIRST_CHARACTERS
            while len(start) < len(text) and not self._is_enough(encoding, max_tokens, per_token):
                per_token *= 8
                start = _start(text, per_token * wanted)
                [encoding] = self._encode([start])
            found.append(encoding)
        return found

    def _is_enough(self, encoding: Encoding, max_tokens: int, per_token: int) -> bool:
        """Return whether the first ids of a start are those of the whole text, or all that is to be read has been."""
        n_stable = len(encoding.ids) - SLACK
        if per_token >= CHARACTERS_SEARCHED:
            return True
        if n_stable < max_tokens:
            return False
        return per_token >= CHARACTERS_READ or self._has_boundary(encoding.tokens[max_tokens - 1 : n_stable + 1])

    def _has_boundary(self, tokens: Sequence[str]) -> bool:
        """Return whether no merge can join some token and the next, whatever text they stand in."""
        pairs = dict.fromkeys(left[-1:] + right[:1] for left, right in pairwise(tokens))
        return self._is_concatenative and any(pair not in self._vocabulary for pair in pairs)

    @kept_property
    def _is_concatenative(self) -> bool:
        """Whether tokens come from merges, and each is written as what it was merged from."""
        from tokenizers.models import BPE

        model = self._tokenizer.model
        return isinstance(model, BPE) and not model.continuing_subword_prefix and not model.dropout

    @kept_property
    def _vocabulary(self) -> str:
        """All tokens; a pair of characters that is not in it is in no token."""
        return "\0".join(self._tokenizer.get_vocab(with_added_tokens=True))


def _start(text: str, n_characters: int) -> str:
    """Return about the first characters of a text, ending before one that stands on its own."""
    if len(text) <= n_characters:
        return text
    ends = range(n_characters, n_characters - MAX_MARKS, -1)
    return text[: next((end for end in ends if _stands_alone(text[end])), n_characters)]


def _stands_alone(character: str) -> bool:
    """Return whether a character is neither a mark on the one before it nor the second half of a surrogate pair."""
    is_second_half = "\udc00" <= character <= "\udfff"
    return not is_second_half and not unicodedata.combining(unicodedata.normalize("NFKD", character)[0])
