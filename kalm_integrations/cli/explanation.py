"""What `kalm explain` shows, whatever it is shown in: passages before and after ranking, and their sentences' scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kalm_integrations.core.types import RankedPassage, Ranking, Span, Status

LEVELS = (0.2, 0.4, 0.6, 0.8)
"""Scores at which a deeper shade begins."""

ENCODINGS: dict[Status, str] = {
    "stored": "found with the passage",
    "cached": "found in memory",
    "found": "found in the store",
    "missing": "made now",
    "stale": "made now, for the one with the passage is of another text or model",
    "corrupt": "made now, for the one with the passage is damaged",
}
"""Where a passage's encoding came from."""


OUTSIDE = "outside"
"""What is said of text that is not in the window that scores best."""
UNREAD = "not read"


@dataclass(frozen=True)
class Explained:
    """A passage with its place before and after."""

    rank: int
    """After ranking, from 1."""
    passage: RankedPassage
    name: str
    text: str
    status: Status
    """Of its encoding."""

    @property
    def place(self) -> int:
        """Where it was before, from 1."""
        return self.passage.index + 1

    @property
    def move(self) -> str:
        """By how many places it moved."""
        n_up = self.place - self.rank
        return f"up {n_up}" if n_up > 0 else f"down {-n_up}" if n_up < 0 else "same place"

    @property
    def spans(self) -> Sequence[Span]:
        """Its sentences, best first; none if they were not scored."""
        return self.passage.spans or ()

    @property
    def window(self) -> str:
        """Where the window lies that scores best; empty if the passage was read in one piece."""
        if self.passage.window is None:
            return ""
        start, end = self.passage.window
        return f"best window: characters {start:,} to {end:,} of {len(self.text):,}"

    def pieces(self) -> Iterator[tuple[str, Span | str]]:
        """Yield the text in order: sentences, and what lies between and around them, with the reason why that is none."""
        place = 0
        for span in sorted(self.spans, key=lambda span: span.start):
            yield from self._between(place, span.start)
            yield self.text[span.start : span.end], span
            place = span.end
        yield from self._between(place, len(self.text))

    def _between(self, start: int, end: int) -> Iterator[tuple[str, str]]:
        first, stop = self.passage.window or (0, len(self.text))
        parts = (
            (start, min(end, first), OUTSIDE),
            (max(start, first), min(end, stop), UNREAD),
            (max(start, stop), end, OUTSIDE),
        )
        yield from ((self.text[a:b], reason) for a, b, reason in parts if a < b)


@dataclass(frozen=True)
class Explanation:
    """A ranking, and its best passages in detail."""

    query: str
    model: str
    passages: Sequence[Explained]
    """All that were ranked, best first."""
    n_detailed: int
    """How many of the best have their sentences scored."""

    @classmethod
    def of(
        cls, query: str, model: str, ranking: Ranking, names: Sequence[str], texts: Sequence[str], n_detailed: int
    ) -> Explanation:
        """Take a ranking of all passages; names and texts are in the order in which they came."""
        passages = [
            Explained(rank, passage, names[passage.index], texts[passage.index], ranking.reading[passage.index])
            for rank, passage in enumerate(ranking, 1)
        ]
        return cls(query, model, passages, min(n_detailed, len(passages)))

    @property
    def after(self) -> Sequence[Explained]:
        """The best passages, as they are ranked."""
        return self.passages[: self.n_detailed]

    @property
    def before(self) -> Sequence[Explained]:
        """As many passages, the first that came."""
        return sorted(self.passages, key=lambda passage: passage.place)[: self.n_detailed]

    @property
    def n_made(self) -> int:
        """Passages whose encoding had to be made."""
        return sum(ENCODINGS[passage.status].startswith("made") for passage in self.passages)


def level_of(score: float) -> int:
    """Return the shade of a score, from 0 to 4."""
    return sum(score >= start for start in LEVELS)
