"""`relevant_spans`, as Cohere's clients ask for them: which sentences of a document speak for it."""

from __future__ import annotations

import json

import cohere
import pytest

QUERY = "Who won the Super Bowl?"
TEXTS = [
    "Lift and drag of a wing 🪽. It flies! A wing stalls when it is held too steep.",
    "Denver won Super Bowl 50. 東京は雨です。The Panthers lost it; their defense gave up 308 points.",
    "",
]
PATHS = ["/v2/rerank", "/v1/rerank", "/rerank"]


@pytest.fixture
def client(make_client, make_reranker):
    return make_client(make_reranker())


@pytest.fixture
def expected(make_reranker):
    """Each document's spans, by its index."""
    return {passage.index: passage.spans for passage in make_reranker().rank(QUERY, TEXTS, spans=3)}


def ask(client, path, spans, **body):
    response = client.post(path, json={"query": QUERY, "documents": TEXTS, "relevant_spans": spans, **body})
    assert response.status_code == 200, response.text
    return {result["index"]: result for result in response.json()["results"]}


def places(spans):
    return [(span["start"], span["end"]) for span in spans]


@pytest.mark.parametrize("path", PATHS)
def test_spans_are_those_of_the_reranker(client, expected, path):
    results = ask(client, path, {"mode": "enabled", "threshold": 0})
    assert list(results) == list(expected)
    for index in (0, 1):
        spans = results[index]["relevant_spans"]
        assert len(spans) == 3
        assert places(spans) == [(span.start, span.end) for span in expected[index]]
        assert [span["score"] for span in spans] == pytest.approx([span.score for span in expected[index]], abs=1e-6)
        assert [set(span) for span in spans] == [{"start", "end", "score"}] * 3
    sentences = sorted(TEXTS[0][start:end] for start, end in places(results[0]["relevant_spans"]))
    assert sentences == ["A wing stalls when it is held too steep.", "It flies!", "Lift and drag of a wing 🪽."]
    assert "relevant_spans" not in results[2], "an empty document has none"


def test_only_the_best_above_the_threshold(client, expected):
    best, second, third = (span.score for span in expected[0])
    assert best > second > third
    for threshold, max_spans, n_spans in (
        (second - 1e-4, None, 2),
        (second - 1e-4, 9, 2),
        (second - 1e-4, 1, 1),
        (second + 1e-4, None, 1),
        (0, 2, 2),
    ):
        results = ask(client, "/v2/rerank", {"mode": "enabled", "threshold": threshold, "max_spans": max_spans})
        wanted = [(span.start, span.end) for span in expected[0][:n_spans]]
        assert places(results[0]["relevant_spans"]) == wanted
    assert "relevant_spans" not in ask(client, "/v2/rerank", {"mode": "enabled", "threshold": 1})[0]
    default = ask(client, "/v2/rerank", {"mode": "enabled"})
    for threshold in (0.1, None):
        assert default == ask(client, "/v2/rerank", {"mode": "enabled", "threshold": threshold, "max_spans": None})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("spans", [None, {"mode": "disabled"}, {"mode": "disabled", "threshold": 0.0}], ids=str)
def test_answers_without_spans_are_what_they_were(client, path, spans):
    plain = client.post(path, json={"query": QUERY, "documents": TEXTS}).json()
    asked = client.post(path, json={"query": QUERY, "documents": TEXTS, "relevant_spans": spans}).json()
    assert [set(result) for result in plain["results"]] == [{"index", "relevance_score"}] * 3
    assert {**plain, "id": ""} == {**asked, "id": ""}


def test_top_n_and_no_documents(client, expected):
    results = ask(client, "/v2/rerank", {"mode": "enabled", "threshold": 0}, top_n=1)
    assert list(results) == list(expected)[:1]
    assert ask(client, "/v2/rerank", {"mode": "enabled"}, documents=[]) == {}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("spans", "place"),
    [
        ({"mode": "on"}, "relevant_spans.mode"),
        ({}, "relevant_spans.mode"),
        ({"mode": "enabled", "threshold": 2}, "relevant_spans.threshold"),
        ({"mode": "enabled", "max_spans": 0}, "relevant_spans.max_spans"),
        (True, "relevant_spans"),
    ],
    ids=str,
)
def test_what_is_no_such_request_is_refused(client, path, spans, place):
    answer = client.post(path, json={"query": QUERY, "documents": TEXTS, "relevant_spans": spans})
    assert answer.status_code == 422
    assert set(answer.json()) == {"detail"}
    assert answer.json()["detail"].startswith(f"{place}: ")


def test_spans_of_a_cut_document_are_of_the_document_that_was_sent(client, make_reranker):
    reranker = make_reranker()
    [cut] = reranker.truncate(TEXTS[:1], 30)
    assert TEXTS[0].startswith(cut)
    assert len(cut) < len(TEXTS[0])
    results = ask(client, "/v2/rerank", {"mode": "enabled", "threshold": 0}, documents=TEXTS[:1], max_tokens_per_doc=30)
    spans = reranker.highlight(QUERY, cut)
    assert places(results[0]["relevant_spans"]) == [(span.start, span.end) for span in spans]


def test_halves_of_surrogate_pairs_count_as_they_were_sent(client):
    """JSON may escape a character as a pair, which is one code point; half of one is one too."""
    document = rb'"\ud83e\udebd a wing. \ud83d It flies."'
    body = b'{"query": "a", "documents": [%s], "relevant_spans": {"mode": "enabled", "threshold": 0}}' % document
    answer = client.post("/v2/rerank", content=body, headers={"content-type": "application/json"})
    text = json.loads(document)
    spans = answer.json()["results"][0]["relevant_spans"]
    assert sorted(text[start:end] for start, end in places(spans)) == sorted(["🪽 a wing.", "\ud83d It flies."])


def test_coheres_client_reads_them(serve, make_reranker, expected):
    """The SDK has fields for them from version 7 on; earlier ones keep what they do not know."""
    client = cohere.ClientV2("none", base_url=serve(make_reranker(), model_names=("rerank-v5",)))
    more = {"additional_body_parameters": {"relevant_spans": {"mode": "enabled", "threshold": 0.0, "max_spans": 2}}}
    results = client.rerank(model="rerank-v5", query=QUERY, documents=TEXTS, request_options=more).results
    assert [result.index for result in results] == list(expected)
    for result in results:
        wanted = [(span.start, span.end) for span in expected[result.index][:2]]
        assert places(getattr(result, "relevant_spans", [])) == wanted
