"""KaLM-Reranker-V1 as a Haystack ranker."""

import haystack_integrations.common.kalm  # noqa: F401  # first, because it says what to install
from haystack_integrations.components.rankers.kalm.ranker import KalmRanker

__all__ = ["KalmRanker"]
