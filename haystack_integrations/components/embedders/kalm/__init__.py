"""KaLM-Reranker-V1's passage encoder as a Haystack document embedder."""

import haystack_integrations.common.kalm  # noqa: F401  # first, because it says what to install
from haystack_integrations.components.embedders.kalm.document_encoder import KalmDocumentEncoder

__all__ = ["KalmDocumentEncoder"]
