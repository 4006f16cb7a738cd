"""KaLM-Reranker-V1 for LangChain: the names of `kalm_integrations.langchain`."""

from kalm_integrations.langchain import *
from kalm_integrations.langchain import __all__ as __all__
