"""TEI's `truncate: false` refuses what is not read to its end, and nothing else."""

from __future__ import annotations

import json

import pytest

from kalm_integrations import KalmReranker

LIMIT = 64
SENTENCE = "The Rhine rises in the Swiss Alps and flows north. "
READINGS = {
    "cut": {"long_passages": "cut", "max_passage_tokens": LIMIT},
    "windows": {"long_passages": "windows", "max_passage_tokens": LIMIT, "max_windows": 3},
}


@pytest.fixture(params=READINGS)
def reranker(request) -> KalmReranker:
    return KalmReranker.from_pretrained("pico", **READINGS[request.param])


def post(client, texts, **body):
    # In ASCII, which halves of surrogate pairs fit into.
    content = json.dumps({"query": "Where does the Rhine rise?", "texts": texts, **body})
    return client.post("/rerank", content=content, headers={"content-type": "application/json"})


def test_texts_that_are_not_read_to_their_end_are_refused(make_client, reranker):
    """A refusal says what the counter says."""
    client = make_client(reranker)
    words = (SENTENCE * 20).split()
    lengths = range(10, len(words), 23)
    refused = []
    for n_words in lengths:
        text = " ".join(words[:n_words])
        before = reranker.stats.truncated
        response = post(client, [text], truncate=False)
        assert response.status_code in (200, 413)
        assert (response.status_code == 413) == (reranker.stats.truncated > before)
        refused.append(response.status_code == 413)
        assert post(client, [text]).status_code == post(client, [text], truncate=True).status_code == 200
    n_read = refused.index(True)
    assert 0 < n_read < len(lengths) - 1
    assert all(refused[n_read:])


def test_a_refusal_names_the_text_and_encodes_nothing_twice(make_client, reranker):
    client = make_client(reranker)
    long = SENTENCE * 30
    response = post(client, ["", "\ud83d short", "\ud83d\udc1f " + long], truncate=False)
    assert response.status_code == 413
    most = client.get("/info").json()["max_input_length"]
    detail = response.json()["detail"]
    assert detail.startswith("texts.2 must be read to its end if truncate is false")
    assert f"at most {most} tokens" in detail
    assert SENTENCE not in response.text
    assert reranker.stats.passages_encoded == 3
    assert post(client, ["", "\ud83d short"], truncate=False).status_code == 200
    assert post(client, [], truncate=False).json() == []
    assert reranker.stats.passages_encoded == 3


def test_blanks_at_the_end_of_the_last_window_are_no_loss(make_client, reranker):
    client = make_client(reranker)
    assert post(client, [SENTENCE * 2 + "\n"], truncate=False).status_code == 200
    if reranker.max_tokens_read > LIMIT:
        assert post(client, [SENTENCE * 8 + " \n" * 9], truncate=False).status_code == 200


def test_a_reranker_that_reads_everything_refuses_nothing(make_client):
    assert post(make_client(), [SENTENCE * 1000], truncate=False).status_code == 200
