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

    def pieces(self) -> Iterator[tuple[str, Span | None]]:
        """Yield the text in order: sentences, and what lies between and behind them."""
        place = 0
        for span in sorted(self.spans, key=lambda span: span.start):
            if place < span.start:
                yield self.text[place : span.start], None
            yield self.text[span.start : span.end], span
            place = span.end
        if place < len(self.text):
            yield self.text[place:], None


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
