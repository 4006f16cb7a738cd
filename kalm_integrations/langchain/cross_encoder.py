"""LangChain's cross-encoder interface, for components that ask for one."""

from __future__ import annotations

from langchain_core.cross_encoders import BaseCrossEncoder

from kalm_integrations.langchain.model import WithReranker


class KalmCrossEncoder(WithReranker, BaseCrossEncoder):
    """Scores pairs of texts, for `CrossEncoderReranker` and its like.

    It sees texts only, so it cannot use stored encodings; what it encodes stays in memory. Prefer `KalmRerank`.
    """

    instruction: str | None = None
    """What makes a text relevant."""

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """Return P(yes) for each pair of a query and a text, in order; each query is one call of the model."""
        places: dict[str, list[int]] = {}
        for place, (query, _) in enumerate(text_pairs):
            places.setdefault(query, []).append(place)
        scores = [0.0] * len(text_pairs)
        for query, indices in places.items():
            texts = [text_pairs[index][1] for index in indices]
            for index, score in zip(indices, self.reranker.score(query, texts, self.instruction), strict=True):
                scores[index] = float(score)
        return scores
