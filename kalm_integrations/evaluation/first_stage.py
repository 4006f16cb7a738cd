"""A lexical first stage: BM25 by bm25s, with its defaults and English stop words."""

from __future__ import annotations

from collections.abc import Sequence


class BM25:
    """Finds candidate passages for queries."""

    def __init__(self, passages: Sequence[str]) -> None:
        """Index passages.

        Raises:
            MissingExtraError: bm25s is not installed.
        """
        import bm25s

        self._bm25s = bm25s
        self._index = bm25s.BM25()
        self._index.index(bm25s.tokenize(list(passages), stopwords="en", show_progress=False), show_progress=False)

    def search(self, queries: Sequence[str], k: int) -> list[tuple[list[int], list[float]]]:
        """Return for each query the indices of its `k` best passages, best first, and their scores."""
        tokens = self._bm25s.tokenize(list(queries), stopwords="en", show_progress=False)
        indices, scores = self._index.retrieve(tokens, k=k, show_progress=False)
        return [(i.tolist(), s.tolist()) for i, s in zip(indices, scores, strict=True)]
