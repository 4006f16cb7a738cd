"""LangChain's cross-encoder interface, for components that ask for one."""

from __future__ import annotations

from langchain_core.cross_encoders import BaseCrossEncoder

from kalm_integrations.core.pairs import score_pairs
from kalm_integrations.hosting.fields import QueryFields


class KalmCrossEncoder(QueryFields, BaseCrossEncoder):
    """Scores pairs of texts, for `CrossEncoderReranker` and its like.

    It sees texts only, so it cannot use stored encodings; what it encodes stays in memory. Prefer `KalmRerank`.
    """

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """Return P(yes) for each pair of a query and a text, in order; a text that several queries share is encoded once."""
        if not text_pairs:
            # Nothing to score opens no model.
            return []
        return [pair.score for pair in score_pairs(self.reranker, text_pairs, self.instruction)]
