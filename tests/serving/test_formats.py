"""What each format takes and returns."""

from __future__ import annotations

import pytest

from kalm_integrations.testing import FakeReranker

QUERY = "otters eat crabs"
TEXTS = ["the Rhine", "otters eat crabs", "otters swim"]
ORDER = [1, 2, 0]


@pytest.fixture
def client(make_client):
    return make_client(model_names=("rerank-v3.5",))


@pytest.fixture
def scores():
    return {passage.index: passage.score for passage in FakeReranker().rank(QUERY, TEXTS)}


def post(client, path, **body):
    response = client.post(path, json={"query": QUERY, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_cohere(client, scores):
    answer = post(client, "/v2/rerank", model="rerank-v3.5", documents=TEXTS, priority=3)
    assert answer["results"] == [{"index": index, "relevance_score": scores[index]} for index in ORDER]
    assert answer["id"]
    assert answer["meta"] == {"api_version": {"version": "2"}}


def test_jina(client, scores):
    answer = post(client, "/v1/rerank", model="rerank-v3.5", documents=TEXTS, top_n=2, return_documents=True)
    assert answer["model"] == "rerank-v3.5"
    assert answer["usage"] == {"total_tokens": 0}
    assert answer["results"] == [
        {"index": index, "relevance_score": scores[index], "document": {"text": TEXTS[index]}} for index in ORDER[:2]
    ]
    assert post(client, "/rerank", documents=TEXTS)["results"] == [
        {"index": index, "relevance_score": scores[index]} for index in ORDER
    ]
    assert post(client, "/rerank", documents=TEXTS)["model"] == "fake"


def test_tei(client, scores):
    assert post(client, "/rerank", texts=TEXTS) == [{"index": index, "score": scores[index]} for index in ORDER]
    [best, *_] = post(client, "/rerank", texts=TEXTS, return_text=True, truncate=True, truncation_direction="Right")
    assert best["text"] == TEXTS[1]
    margins = {passage.index: passage.margin for passage in FakeReranker().rank(QUERY, TEXTS)}
    assert post(client, "/rerank", texts=TEXTS, raw_scores=True) == [
        {"index": index, "score": margins[index]} for index in ORDER
    ]


def test_a_direction_that_the_model_does_not_read_in_is_refused(client):
    body = {"query": QUERY, "texts": TEXTS, "truncate": True, "truncation_direction": "Left"}
    answer = client.post("/rerank", json=body)
    assert answer.status_code == 422
    assert answer.json()["detail"] == "truncation_direction: Input should be 'Right' or 'right'"


@pytest.mark.parametrize("path", ["/v2/rerank", "/v1/rerank", "/rerank"])
def test_documents_may_be_objects(client, path):
    documents = [{"text": TEXTS[0]}, TEXTS[1], {"text": TEXTS[2], "title": "what else there is"}]
    assert [result["index"] for result in post(client, path, documents=documents)["results"]] == ORDER


@pytest.mark.parametrize("path", ["/v2/rerank", "/v1/rerank", "/rerank"])
@pytest.mark.parametrize("top_n", [0, None, 99])
def test_top_n_of_nothing_or_of_more_is_all(client, path, top_n):
    assert len(post(client, path, documents=TEXTS, top_n=top_n)["results"]) == 3


def test_no_documents_give_no_results(client):
    assert post(client, "/v2/rerank", documents=[])["results"] == []
    assert post(client, "/v1/rerank", documents=[])["results"] == []
    assert post(client, "/rerank", texts=[]) == []


def test_halves_of_surrogate_pairs_are_no_failure(client):
    content = rb'{"query": "\ud83d otters", "documents": ["\ud83d otters", ""], "return_documents": true}'
    answer = client.post("/rerank", content=content, headers={"content-type": "application/json"})
    assert answer.json()["results"][0]["document"] == {"text": "? otters"}
    content = content.replace(b'"query"', rb'"model": "\ud83d", "query"')
    assert client.post("/rerank", content=content, headers={"content-type": "application/json"}).status_code == 404


def test_documents_are_cut_only_where_the_model_would_read_more(make_client, make_reranker):
    reranker = make_reranker(max_passage_tokens=16)
    client = make_client(reranker)
    long = "otters eat crabs and the Rhine rises in the Alps " * 3
    whole, cut = make_reranker(max_passage_tokens=16).score(QUERY, [long, *reranker.truncate([long], 5)])
    assert whole != pytest.approx(cut, abs=1e-3)
    for limit, right in ((None, whole), (16, whole), (4096, whole), (5, cut)):
        for path in ("/v2/rerank", "/v1/rerank"):
            [result] = post(client, path, documents=[long], max_tokens_per_doc=limit)["results"]
            assert result["relevance_score"] == pytest.approx(right, abs=1e-6)
    assert reranker.stats.passages_encoded == 2
    assert client.get("/info").json()["max_input_length"] == 16


def test_an_instruction_reaches_the_model(make_client, make_reranker):
    client, reranker = make_client(make_reranker()), make_reranker()
    for instruction in (None, "Given a river, find where it rises."):
        right = [passage.score for passage in reranker.rank(QUERY, TEXTS, instruction=instruction)]
        for path, name in (("/v2/rerank", "documents"), ("/v1/rerank", "documents"), ("/rerank", "documents")):
            results = post(client, path, **{name: TEXTS, "instruction": instruction})["results"]
            assert [result["relevance_score"] for result in results] == pytest.approx(right, abs=1e-6)
        found = [result["score"] for result in post(client, "/rerank", texts=TEXTS, instruction=instruction)]
        assert found == pytest.approx(right, abs=1e-6)
        [score] = client.post(
            "/v1/score", json={"query": QUERY, "passages": [{"text": TEXTS[0]}], "instruction": instruction}
        ).json()["scores"]
        assert score == pytest.approx(reranker.score(QUERY, TEXTS[:1], instruction)[0], abs=1e-6)


def test_what_is_served(client):
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["fake", "rerank-v3.5"]
    info = client.get("/info").json()
    assert info["model_id"] == "fake"
    assert "reranker" in info["model_type"]
    assert info["max_client_batch_size"] == 1000
    assert client.get("/health").json() == {"status": "ok"}


def test_a_folder_is_called_by_its_name(make_client, tiny_checkpoint):
    client = make_client(model=str(tiny_checkpoint))
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [tiny_checkpoint.name]


def test_the_page_shows_every_endpoint_and_loads_nothing(client):
    page = client.get("/docs").text
    for path in client.get("/openapi.json").json()["paths"]:
        assert f"{path}</code>" in page
    assert "What do otters eat?" in page
    assert "http" not in page.replace("HTTP", "")
