"""KaLM-Reranker-V1 for Haystack: the names of `kalm_integrations.haystack`."""

from kalm_integrations.haystack import *
from kalm_integrations.haystack import __all__ as __all__
