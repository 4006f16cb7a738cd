"""Text as the model's tokenizer reads it. Without torch."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TypeAlias

from kalm_integrations.errors import SettingsError

Range: TypeAlias = tuple[int, int]
"""Start and end in a text, in code points; the end does not belong to it."""

MAX_INSTRUCTION_CHARACTERS = 16_384
"""Of an instruction, and of a system instruction. They are never cut, and every query's prompt repeats them."""


def without_surrogates(text: str) -> str:
    """Join surrogate pairs and replace lone surrogates by U+FFFD: stores hold such text, and tokenizers refuse it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def check_instruction_length(instruction: str) -> str:
    """Return an instruction, or a system instruction, if it is not too long.

    Raises:
        SettingsError: it is.
    """
    # Tokenizers normalise text, and a single character can become eighteen.
    n_characters = max(len(instruction), len(unicodedata.normalize("NFKC", instruction[: MAX_INSTRUCTION_CHARACTERS + 1])))
    if n_characters > MAX_INSTRUCTION_CHARACTERS:
        msg = (
            f"an instruction must have at most {MAX_INSTRUCTION_CHARACTERS} characters, also in Unicode's form NFKC, but got "
            f"{n_characters}; shorten it: what differs from query to query belongs into the query"
        )
        raise SettingsError(msg)
    return instruction


def without_blanks(text: str, start: int, end: int) -> Range:
    """Return a range of a text without the blanks at its ends; of blanks alone, one that ends before it starts."""
    piece = text[start:end]
    return end - len(piece.lstrip()), start + len(piece.rstrip())


def ranges_in(text: str, ranges: Sequence[Range]) -> Sequence[Range]:
    """Return where ranges of `without_surrogates(text)`, in code points, lie in the text itself."""
    if len(without_surrogates(text)) == len(text):
        return ranges
    positions = positions_in(text)
    return [(positions[start], positions[end]) for start, end in ranges]


def positions_in(text: str) -> Sequence[int]:
    """Return where each character of `without_surrogates(text)` begins in the text, and where the last one ends."""
    positions, place = [], 0
    while place < len(text):
        positions.append(place)
        is_pair = "\ud800" <= text[place] <= "\udbff" and "\udc00" <= text[place + 1 : place + 2] <= "\udfff"
        place += 2 if is_pair else 1
    return [*positions, place]
