"""What the page is started with: passages, of which all are ranked, or the best of a first stage where they are many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kalm_integrations.core.types import Passage
from kalm_integrations.corpora.bm25 import BM25
from kalm_integrations.corpora.candidates import Candidate


class Collection:
    """Passages of a file, in its order."""

    def __init__(self, name: str, candidates: Sequence[Candidate], limit: int) -> None:
        """Index passages if there are more than are ranked.

        Args:
            name: what the page calls them.
            candidates: the rows of the file.
            limit: how many passages are ranked for a question.

        Raises:
            MissingExtraError: there are more, and what BM25 needs is not installed.
            SettingsError: there are more, and none holds a word to search for.
        """
        self.name = name
        self.limit = limit
        self._rows = [(str(row.row.get("_id", f"line {row.number}")), row.passage) for row in candidates]
        self._index = BM25([row.text for row in candidates]) if len(candidates) > limit else None

    def __len__(self) -> int:
        """Return the number of passages."""
        return len(self._rows)

    @property
    def first_stage(self) -> str | None:
        """What chooses and orders the candidates; None where all passages are candidates, in the file's order."""
        return None if self._index is None else "BM25"

    def choose(self, query: str) -> tuple[list[str], list[Passage]]:
        """Return the names (`_id`, or the line) and the passages to rank; ties keep the file's order."""
        rows = self._rows
        if self._index is not None:
            scores = self._index.scores(query, range(len(rows)))
            rows = [rows[i] for i in sorted(range(len(rows)), key=lambda i: -scores[i])[: self.limit]]
        return [name for name, _ in rows], [passage for _, passage in rows]


@dataclass(frozen=True)
class Page:
    """Tells an application to have the page."""

    collection: Collection | None = None
    """What it can ask beside passages that are put into it."""
