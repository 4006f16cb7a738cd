"""A lexical first stage: BM25 by bm25s, with its defaults and English stop words."""

from __future__ import annotations

from collections.abc import Sequence

from kalm_integrations.errors import MissingExtraError, SettingsError


class BM25:
    """Finds candidate passages for queries."""

    def __init__(self, passages: Sequence[str]) -> None:
        """Index passages.

        Raises:
            MissingExtraError: bm25s is not installed.
            SettingsError: no passage holds a word to search for.
        """
        try:
            import bm25s
        except ImportError as error:
            msg = 'BM25 needs bm25s; install it with: pip install "kalm-integrations[eval]"'
            raise MissingExtraError(msg) from error
        self._bm25s = bm25s
        tokens = bm25s.tokenize(list(passages), stopwords="en", show_progress=False)
        if not tokens.vocab:
            msg = f"passages to search must hold words that are not stop words, but none of {len(passages)} does"
            raise SettingsError(msg)
        self._n_passages = len(passages)
        self._index = bm25s.BM25()
        self._index.index(tokens, show_progress=False)

    def search(self, queries: Sequence[str], k: int) -> list[tuple[list[int], list[float]]]:
        """Return for each query the indices of its `k` best passages (of all, if there are fewer) and their scores."""
        tokens = self._bm25s.tokenize(list(queries), stopwords="en", show_progress=False)
        indices, scores = self._index.retrieve(tokens, k=min(k, self._n_passages), show_progress=False)
        return [(i.tolist(), s.tolist()) for i, s in zip(indices, scores, strict=True)]

    def scores(self, query: str, indices: Sequence[int]) -> list[float]:
        """Return the scores of some passages for a query."""
        [words] = self._bm25s.tokenize([query], stopwords="en", return_ids=False, show_progress=False)
        known = [word for word in words if word in self._index.vocab_dict]
        if not known:
            return [0.0] * len(indices)
        scores: list[float] = self._index.get_scores(known)[list(indices)].tolist()
        return scores
