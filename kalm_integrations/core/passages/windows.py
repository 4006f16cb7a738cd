"""The windows in which a long passage was encoded, and the table of them that begins a payload. Without torch."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from kalm_integrations.core.passages.header import refuse
from kalm_integrations.core.settings import MAX_TOKENS
from kalm_integrations.core.sizes import n_pooled_states
from kalm_integrations.core.text import Range

_COUNT = struct.Struct("<I")
_ROW = struct.Struct("<III")
_MAX_NUMBER = 2**32 - 1


class Window(NamedTuple):
    """A part of a passage that the encoder has read as if it were a passage of its own."""

    start: int
    """Of its first character in the passage without surrogates, in code points."""
    end: int
    """Of the character behind its last one."""
    n_tokens: int
    """That the encoder has read of it; those of the template's prefix are among them."""

    def place_in(self, text: str) -> Range:
        """Return where it lies in a passage without surrogates, also if somebody made it for another one."""
        return min(self.start, len(text)), min(self.end, len(text))


Windows = tuple[Window, ...]


def n_states_of(windows: Sequence[Window], ratio: int) -> int:
    """Return how many states the windows have together: each is pooled on its own."""
    return sum(n_pooled_states(window.n_tokens, ratio) for window in windows)


def write_table(windows: Sequence[Window] | None) -> bytes:
    """Return what stands before the states of a passage in windows; nothing for another one."""
    if windows is None:
        return b""
    return _COUNT.pack(len(windows)) + b"".join(_ROW.pack(*window) for window in windows)


def split_body(fields: dict[str, Any], body: bytes) -> tuple[Windows | None, bytes]:
    """Return the windows, if a checked header says that there are some, and the states' bytes.

    Raises:
        CorruptEncodingError: no passage has such windows.
    """
    if "w" not in fields:
        return None, body
    windows, states = read_table(body)
    check_windows(windows, fields)
    return windows, states


def read_table(body: bytes) -> tuple[Windows, bytes]:
    """Return the windows that a body begins with, and what follows them.

    Raises:
        CorruptEncodingError: it is too short for as many as it names.
    """
    count = _COUNT.unpack_from(body)[0] if len(body) >= _COUNT.size else 0
    end = table_bytes(count)
    if not 1 <= count <= MAX_TOKENS or len(body) < end:
        refuse(f"begin with a table of its windows, but {len(body)} bytes hold none of {count}")
    return tuple(Window(*row) for row in _ROW.iter_unpack(body[_COUNT.size : end])), body[end:]


def table_bytes(n_windows: int) -> int:
    """Return the bytes that a table takes."""
    return _COUNT.size + n_windows * _ROW.size


def check_windows(windows: Sequence[Window], fields: dict[str, Any]) -> None:
    """Compare windows with the header's checked fields.

    Raises:
        CorruptEncodingError: they do not agree, or are not in order.
    """
    numbers = [number for window in windows for number in window]
    if any(type(number) is not int or not 0 <= number <= _MAX_NUMBER for number in numbers):
        refuse(f"have windows of whole numbers from 0 to {_MAX_NUMBER}")
    tokens = [window.n_tokens for window in windows]
    n_states = n_states_of(windows, fields["r"])
    if (len(windows), sum(tokens), n_states) != (fields["w"], fields["n"], fields["s"][0]) or not all(tokens):
        wanted = f"{fields['w']} windows, {fields['n']} tokens and {fields['s'][0]} states"
        refuse(f"have windows as its header says, {wanted}, but has {len(windows)}, {sum(tokens)} and {n_states}")
    is_rising = all(a.start < b.start and a.end < b.end for a, b in pairwise(windows))
    if not is_rising or any(window.start >= window.end for window in windows):
        refuse("have windows that follow one another in the text, each of one character at least")
