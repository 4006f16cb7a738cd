"""What is read of a passage: all of it at once, its beginning, or its windows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from kalm_integrations.core.passages.windows import Windows
from kalm_integrations.core.settings import EncoderSettings
from kalm_integrations.core.sizes import n_pooled_states
from kalm_integrations.core.windowing import expected_windows


@dataclass(frozen=True)
class PassageRead:
    """What the encoder reads of a passage of the mean length."""

    sizes: Mapping[int, int]
    """How many parts of a passage have how many tokens; a part is read, and scored, on its own."""
    windows: Windows | None
    """Expected ones of a long passage; None where it is read in one piece."""
    n_unread: int
    """Tokens of the passage that are not read."""

    @property
    def n_parts(self) -> int:
        """How many parts there are."""
        return sum(self.sizes.values())

    @property
    def n_tokens(self) -> int:
        """Tokens that are read; what windows repeat is counted each time."""
        return sum(size * n_parts for size, n_parts in self.sizes.items())

    def n_states(self, ratio: int) -> int:
        """Return how many pooled states there are: each part is pooled on its own."""
        return sum(n_pooled_states(size, ratio) * n_parts for size, n_parts in self.sizes.items())


def read_of(n_tokens: int, encoder: EncoderSettings) -> PassageRead:
    """Return what is read of a passage of so many tokens."""
    if encoder.n_windows is None or n_tokens < encoder.max_passage_tokens:
        n_read = min(n_tokens, encoder.max_passage_tokens)
        return PassageRead({n_read: 1}, None, n_tokens - n_read)
    windows = expected_windows(n_tokens, encoder.max_passage_tokens, encoder.n_windows)
    return PassageRead(Counter(window.n_tokens for window in windows), windows, n_tokens - windows[-1].end)
