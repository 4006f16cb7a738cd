"""Clients of other services, unchanged: each gets our order and scores, and what it sends again is not encoded again."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import cohere
import httpx
import pytest
from haystack import Document
from haystack.utils import Secret
from haystack_integrations.components.rankers.cohere import CohereRanker
from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker
from haystack_integrations.components.rankers.jina import JinaRanker
from haystack_integrations.components.rankers.vllm import VLLMRanker
from langchain_cohere import CohereRerank as LangChainCohere
from langchain_core.documents import Document as LangChainDocument
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.postprocessor.cohere_rerank import CohereRerank as LlamaIndexCohere
from llama_index.postprocessor.jinaai_rerank import JinaRerank
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference
from tools.services import Running

from kalm_integrations import KalmReranker

QUERY = "What do otters eat?"
TEXTS = [
    "The Rhine rises in the Swiss Alps.",
    "Otters live on fish and crabs.",
    "Denver won Super Bowl 50 in 2016.",
    "Sea otters crack mussels with stones.",
]
TOP = 3
INSTRUCTION = "Given a question, find passages about rivers."
fresh = itertools.count()

Ranked = list[tuple[str, float]]
Client = Callable[[str, str, list[str]], Ranked]


def cohere_sdk(url, query, texts):
    client = cohere.ClientV2("none", base_url=url)
    results = client.rerank(model="rerank-v3.5", query=query, documents=texts, top_n=TOP).results
    return [(texts[result.index], result.relevance_score) for result in results]


def cohere_sdk_v1(url, query, texts):
    client = cohere.Client("none", base_url=url)
    documents = [{"text": text} for text in texts]
    results = client.rerank(model="rerank-v3.5", query=query, documents=documents, top_n=TOP, return_documents=True).results
    return [(result.document.text, result.relevance_score) for result in results]


def langchain_cohere(url, query, texts):
    compressor = LangChainCohere(cohere_api_key="none", base_url=url, model="rerank-v3.5", top_n=TOP)
    found = compressor.compress_documents([LangChainDocument(text) for text in texts], query)
    return [(document.page_content, document.metadata["relevance_score"]) for document in found]


def of_llama_index(postprocessor, query, texts):
    nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for text in texts]
    found = postprocessor.postprocess_nodes(nodes, QueryBundle(query))
    return [(node.node.text, node.score) for node in found]


def llama_index_cohere(url, query, texts):
    return of_llama_index(LlamaIndexCohere(api_key="none", base_url=url, model="rerank-v3.5", top_n=TOP), query, texts)


def llama_index_jina(url, query, texts):
    postprocessor = JinaRerank(api_key="none", base_url=f"{url}/v1", model="jina-reranker-v2", top_n=TOP)
    return of_llama_index(postprocessor, query, texts)


def llama_index_tei(url, query, texts):
    return of_llama_index(TextEmbeddingInference(base_url=url, top_n=TOP), query, texts)


def of_haystack(ranker, query, texts):
    found = ranker.run(query=query, documents=[Document(content=text) for text in texts])["documents"]
    return [(document.content, document.score) for document in found]


def haystack_cohere(url, query, texts):
    ranker = CohereRanker(api_key=Secret.from_token("none"), api_base_url=url, model="rerank-v3.5", top_k=TOP)
    return of_haystack(ranker, query, texts)


def haystack_jina(url, query, texts):
    ranker = JinaRanker(api_key=Secret.from_token("none"), base_url=f"{url}/v1/rerank", model="jina-reranker-v2", top_k=TOP)
    return of_haystack(ranker, query, texts)


def haystack_tei(url, query, texts):
    return of_haystack(HuggingFaceTEIRanker(url=url, top_k=TOP, token=None), query, texts)


def haystack_vllm(url, query, texts):
    return of_haystack(VLLMRanker(model="pico", api_key=None, api_base_url=f"{url}/v1", top_k=TOP), query, texts)


CLIENTS: list[Client] = [
    cohere_sdk,
    cohere_sdk_v1,
    langchain_cohere,
    llama_index_cohere,
    llama_index_jina,
    llama_index_tei,
    haystack_cohere,
    haystack_jina,
    haystack_tei,
    haystack_vllm,
]


@pytest.fixture(scope="module")
def reranker() -> KalmReranker:
    return KalmReranker.from_pretrained("pico")


def expected(reranker: KalmReranker, texts: list[str], **arguments: object) -> Ranked:
    return [(passage.text, passage.score) for passage in reranker.rank(QUERY, texts, TOP, **arguments)]


def assert_same(found: Ranked, right: Ranked) -> None:
    assert [text for text, _ in found] == [text for text, _ in right]
    assert [score for _, score in found] == pytest.approx([score for _, score in right], abs=1e-6)


@pytest.mark.parametrize("ask", CLIENTS, ids=lambda ask: ask.__name__)
def test_a_client_gets_our_ranking_and_is_encoded_once(service: Running, reranker, ask: Client):
    texts = [f"{text} ({next(fresh)})" for text in TEXTS]
    before = service.encoded()
    assert_same(ask(service.url, QUERY, texts), expected(reranker, texts))
    after = service.encoded()
    assert after - before == len(texts)
    assert_same(ask(service.url, QUERY, texts), expected(reranker, texts))
    ask(service.url, "Where does the Rhine rise?", texts)
    assert service.encoded() == after


def test_what_one_client_sends_serves_all_others(service: Running):
    texts = [f"{text} ({next(fresh)})" for text in TEXTS]
    cohere_sdk(service.url, QUERY, texts)
    before = service.encoded()
    for ask in CLIENTS:
        ask(service.url, QUERY, texts)
    assert service.encoded() == before


def test_vllms_client_can_carry_an_instruction(service: Running, reranker):
    ranker = VLLMRanker(
        model="pico", api_key=None, api_base_url=f"{service.url}/v1", top_k=TOP, extra_parameters={"instruction": INSTRUCTION}
    )
    assert_same(of_haystack(ranker, QUERY, TEXTS), expected(reranker, TEXTS, instruction=INSTRUCTION))


def test_teis_raw_scores_are_margins(service: Running, reranker):
    found = of_haystack(HuggingFaceTEIRanker(url=service.url, top_k=TOP, token=None, raw_scores=True), QUERY, TEXTS)
    right = [(passage.text, passage.margin) for passage in reranker.rank(QUERY, TEXTS, TOP)]
    assert [text for text, _ in found] == [text for text, _ in right]
    assert [score for _, score in found] == pytest.approx([score for _, score in right], abs=1e-4)


def test_clients_see_what_is_wrong(service: Running):
    with pytest.raises(cohere.NotFoundError, match=r"model must be one of pico, rerank-v3\.5, jina-reranker-v2, but got 'no'"):
        cohere.ClientV2("none", base_url=service.url).rerank(model="no", query=QUERY, documents=TEXTS)
    with pytest.raises(RuntimeError, match="model must be one of pico"):
        of_llama_index(JinaRerank(api_key="none", base_url=f"{service.url}/v1", model="no"), QUERY, TEXTS)
    with pytest.raises(RuntimeError, match="query: must hold a word at least"):
        of_haystack(VLLMRanker(model="pico", api_key=None, api_base_url=f"{service.url}/v1"), " ", TEXTS)


def test_the_key_as_each_client_sends_it(serve, key):
    url = serve(api_key_env="KALM_TEST_KEY", model_names=("rerank-v3.5",))
    assert httpx.post(f"{url}/v2/rerank", json={"query": QUERY, "documents": TEXTS}).status_code == 401
    results = cohere.ClientV2(key, base_url=url).rerank(model="rerank-v3.5", query=QUERY, documents=TEXTS).results
    assert results[0].index in (1, 3)
    for token in (key, f"Bearer {key}"):
        assert len(of_llama_index(TextEmbeddingInference(base_url=url, top_n=TOP, auth_token=token), QUERY, TEXTS)) == TOP
    ranker = HuggingFaceTEIRanker(url=url, top_k=TOP, token=Secret.from_token(key))
    assert len(of_haystack(ranker, QUERY, TEXTS)) == TOP
    with pytest.raises(cohere.UnauthorizedError):
        cohere.ClientV2("wrong", base_url=url).rerank(model="rerank-v3.5", query=QUERY, documents=TEXTS)
