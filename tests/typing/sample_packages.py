"""The thin distributions: type checkers see in them what their adapters have; type-checked, never run."""

from haystack import Document
from kalm_haystack import KalmDocumentEncoder, KalmRanker
from langchain_kalm import KalmPassageEncoder, KalmRerank, Written
from llama_index.postprocessor.kalm import KalmRerank as KalmPostprocessor

import kalm_integrations.langchain


def use(documents: list[Document]) -> list[Document]:
    rerank: kalm_integrations.langchain.KalmRerank = KalmRerank(model="pico", top_n=2)
    print(rerank.top_n, KalmPostprocessor("pico", top_n=2).top_n, KalmPassageEncoder(model="pico"), Written)
    encoded: list[Document] = KalmDocumentEncoder(model="pico").run(documents)["documents"]
    ranked: list[Document] = KalmRanker(model="pico").run("query", encoded)["documents"]
    return ranked
