"""KaLM-Reranker-V1 for LangChain, LlamaIndex and Haystack, with passage encodings kept in the host's docstore.

Names are loaded when they are first used: importing the package loads neither torch nor a framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kalm_integrations.core.base import Reranker as Reranker
    from kalm_integrations.core.passages.encoding import EncodedPassage as EncodedPassage
    from kalm_integrations.core.reranker import KalmReranker as KalmReranker
    from kalm_integrations.core.types import Passage as Passage
    from kalm_integrations.core.types import RankedPassage as RankedPassage
    from kalm_integrations.core.types import Ranking as Ranking
    from kalm_integrations.core.types import Reading as Reading
    from kalm_integrations.core.types import RuntimeStats as RuntimeStats
    from kalm_integrations.core.types import Span as Span
    from kalm_integrations.remote.reranker import RemoteReranker as RemoteReranker

__version__ = "0.1.0"

_HOMES = {
    "EncodedPassage": "kalm_integrations.core.passages.encoding",
    "KalmReranker": "kalm_integrations.core.reranker",
    "Passage": "kalm_integrations.core.types",
    "RankedPassage": "kalm_integrations.core.types",
    "Ranking": "kalm_integrations.core.types",
    "Reading": "kalm_integrations.core.types",
    "RemoteReranker": "kalm_integrations.remote.reranker",
    "Reranker": "kalm_integrations.core.base",
    "RuntimeStats": "kalm_integrations.core.types",
    "Span": "kalm_integrations.core.types",
}

__all__ = [
    "EncodedPassage",
    "KalmReranker",
    "Passage",
    "RankedPassage",
    "Ranking",
    "Reading",
    "RemoteReranker",
    "Reranker",
    "RuntimeStats",
    "Span",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
