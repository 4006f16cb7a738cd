"""KaLM-Reranker-V1 for LlamaIndex: the names of `kalm_integrations.llama_index`."""

from kalm_integrations.llama_index import *
from kalm_integrations.llama_index import __all__ as __all__
