"""What our own clients ask for: scores with encodings that they hold, and encodings, one body or line by line."""

from __future__ import annotations

import itertools
import json
import socket
import time

import httpx
import pytest
from tools.services import number
from tools.waiting import until

from kalm_integrations import EncodedPassage
from kalm_integrations.remote.protocol import EncodingsAnswer, ScoreAnswer, ServiceFacts
from kalm_integrations.serving.formats import stream
from kalm_integrations.testing import FakeReranker

QUERY = "who won the Super Bowl?"
TEXTS = ["Denver won Super Bowl 50.", "Lift and drag of a wing.", "The Panthers defense."]
NDJSON = {"content-type": "application/x-ndjson"}


@pytest.fixture
def client(make_client, make_reranker):
    return make_client(make_reranker())


@pytest.fixture
def encodings(make_reranker):
    return [metadata["kalm_encoding"] for metadata in make_reranker().encode_to_metadata(TEXTS)]


def score(client, passages, /, **body) -> ScoreAnswer:
    response = client.post("/v1/score", json={"query": QUERY, "passages": passages, **body})
    assert response.status_code == 200, response.text
    return ScoreAnswer.model_validate_json(response.content)


def of(texts, encodings=None, held=None):
    given = zip(texts, encodings or itertools.repeat(None), held or itertools.repeat(None), strict=False)
    return [{"text": text, "encoding": encoding, "held": name} for text, encoding, name in given]


# --- scores


def test_facts(client, make_reranker):
    reranker = make_reranker()
    facts = ServiceFacts.model_validate_json(client.get("/v1/kalm").content)
    assert (facts.model, facts.fingerprint) == ("fake", reranker.fingerprint)
    assert (facts.compression_ratio, facts.storage_codec) == (reranker.compression_ratio, reranker.storage_codec)


def test_scores_come_in_the_order_of_the_passages(client, make_reranker):
    ranking = sorted(make_reranker().rank(QUERY, TEXTS), key=lambda passage: passage.index)
    answer = score(client, of(TEXTS))
    assert answer.scores == pytest.approx([passage.score for passage in ranking], abs=1e-6)
    assert answer.margins == pytest.approx([passage.margin for passage in ranking], abs=1e-4)
    assert answer.statuses == ["missing"] * 3
    assert score(client, of(TEXTS)).statuses == ["cached"] * 3
    assert score(client, []).scores == []


def test_encodings_are_asked_for_where_there_are_none(client, encodings):
    score(client, of(TEXTS[:1]))
    first = score(client, of(TEXTS, held=["a", "b"]))
    assert (first.wanted, first.scores) == ([1], [])
    encoded = number_of(client, "kalm_passages_encoded_total")
    second = score(client, of(TEXTS[:2], [None, encodings[1]]))
    assert second.statuses == ["cached", "stored"]
    assert number_of(client, "kalm_passages_encoded_total") == encoded
    assert number_of(client, "kalm_encodings_found_total", where="metadata") == 1


def number_of(client, name, **labels):
    lines = [line.split() for line in client.get("/metrics").text.splitlines() if line.startswith(name)]
    return sum(float(value) for found, value in lines if all(f'{label}="{text}"' in found for label, text in labels.items()))


def test_what_one_client_sends_serves_no_other(client, encodings, make_reranker):
    """Whoever may ask can otherwise decide what others get."""
    lie = EncodedPassage.from_metadata(encodings[0])
    lie.states.neg_()
    forged = lie.to_metadata()
    right = make_reranker().score(QUERY, TEXTS[:1])
    answer = score(client, of(TEXTS[:1], [forged], ["lie"]), client="mallory")
    assert answer.statuses == ["stored"]
    assert answer.scores != pytest.approx(right, abs=1e-3)
    # Mallory's own, for later, where it came with the document; a client without a name keeps nothing.
    assert score(client, of(TEXTS[:1], held=["lie"]), client="mallory").statuses == ["cached"]
    score(client, of(TEXTS[:1], [forged], ["lie"]))
    score(client, of(TEXTS[:1], [forged]), client="alice")
    for name, held in (("mallory", "true"), ("alice", "lie"), (None, "lie")):
        assert score(client, of(TEXTS[:1], held=[held]), client=name).wanted == [0]
    assert score(client, of(TEXTS[:1]), client="mallory").scores == pytest.approx(right, abs=1e-6)
    for name in ("alice", None):
        answer = score(client, of(TEXTS[:1]), client=name)
        assert answer.scores == pytest.approx(right, abs=1e-6)
    results = client.post("/v2/rerank", json={"query": QUERY, "documents": TEXTS[:1]}).json()["results"]
    assert results[0]["relevance_score"] == pytest.approx(right[0], abs=1e-6)
    assert client.post("/v1/encodings", json={"texts": TEXTS[:1]}).json()["encodings"][0]["kalm_encoding"] != forged


@pytest.mark.parametrize("bad", ["", "nonsense", "kalm1.e30.AAAA", "kalm1." + "A" * 1000])
def test_a_bad_encoding_is_made_anew(client, encodings, make_reranker, bad):
    answer = score(client, of(TEXTS[:2], [bad, encodings[2]]))
    assert answer.statuses == ["corrupt", "stale"]
    assert answer.scores == pytest.approx(make_reranker().score(QUERY, TEXTS[:2]), abs=1e-6)
    assert number_of(client, "kalm_encodings_corrupt_total") == number_of(client, "kalm_encodings_stale_total") == 1


def test_spans_come_where_they_are_asked_for(client, make_reranker):
    texts = ["Denver won. The Panthers lost.", ""]
    answer = score(client, of(texts), spans=True)
    ranking = sorted(make_reranker().rank(QUERY, texts, spans=2), key=lambda passage: passage.index)
    for spans, passage in zip(answer.spans, ranking, strict=True):
        assert [(span.start, span.end) for span in spans] == [(span.start, span.end) for span in passage.spans]
        assert [span.score for span in spans] == pytest.approx([span.score for span in passage.spans], abs=1e-6)
    assert score(client, of(texts)).spans == []
    assert score(client, [], spans=True).spans == []
    assert ServiceFacts.model_validate_json(client.get("/v1/kalm").content).spans is True


# --- encodings


def test_encodings_are_what_a_reranker_makes(client, make_reranker):
    answer = EncodingsAnswer.model_validate_json(client.post("/v1/encodings", json={"texts": TEXTS}).content)
    assert answer.encodings == make_reranker().encode_to_metadata(TEXTS)
    assert (answer.model, answer.fingerprint) == ("fake", make_reranker().fingerprint)
    assert client.post("/v1/encodings", json={"texts": []}).json()["encodings"] == []
    assert score(client, of(TEXTS)).statuses == ["cached"] * 3


@pytest.mark.parametrize(
    "body", [{}, {"texts": "a"}, {"texts": [1]}, {"texts": ["a"], "more": 1}, {"texts": ["a"], "model": 1}]
)
def test_a_wrong_body_is_refused(client, body):
    answer = client.post("/v1/encodings", json=body)
    assert answer.status_code == 422
    assert isinstance(answer.json()["detail"], str)


def lines_of(content: bytes) -> list[dict]:
    return [json.loads(line) for line in content.splitlines()]


def test_a_stream_is_answered_line_by_line_and_goes_on_after_a_wrong_one(make_client, make_reranker):
    client = make_client(make_reranker(), max_documents=2)
    asked = [
        {"texts": TEXTS[:2]},
        {"texts": TEXTS},
        {"texts": TEXTS[2:], "model": "fake"},
        {"texts": [], "model": None},
        {"texts": ["a"], "model": "gpt"},
        {"texts": [1]},
    ]
    body = b"\n\n".join(json.dumps(line).encode() for line in asked) + b"\r\nno json"
    answer = client.post("/v1/encodings", content=body, headers=NDJSON)
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    made = make_reranker().encode_to_metadata(TEXTS)
    found = lines_of(answer.content)
    assert [line.get("encodings", "wrong") for line in found] == [made[:2], "wrong", made[2:], [], "wrong", "wrong", "wrong"]
    assert found[1]["detail"].startswith("a request must hold at most 2 texts, but holds 3")
    assert found[4]["detail"] == "model must be one of fake, but got 'gpt'"
    assert found[6]["detail"].startswith("a line must be valid JSON")


def test_lines_in_whatever_pieces_they_come(serve):
    url = serve()
    made = FakeReranker().encode_to_metadata(TEXTS)
    body = b"\n".join(json.dumps({"texts": [text]}).encode() for text in TEXTS)
    for end in (b"", b"\n"):
        for size in (1, 7, 1000):
            pieces = ((body + end)[start : start + size] for start in range(0, len(body + end), size))
            answer = httpx.post(f"{url}/v1/encodings", content=pieces, headers=NDJSON)
            assert [line["encodings"] for line in lines_of(answer.content)] == [[metadata] for metadata in made]


def test_short_lines_are_encoded_together(make_client, monkeypatch):
    sizes = []

    async def encode(self, texts, show_progress=False):
        sizes.append(len(texts))
        return FakeReranker.encode_to_metadata(self, texts)

    monkeypatch.setattr(FakeReranker, "aencode_to_metadata", encode)
    monkeypatch.setattr(stream, "TEXTS_AT_ONCE", 4)
    body = b"\n".join(json.dumps({"texts": [f"text {n}"]}).encode() for n in range(10))
    assert len(lines_of(make_client().post("/v1/encodings", content=body, headers=NDJSON).content)) == 10
    assert sizes == [4, 4, 2]


def test_a_line_without_an_end_is_the_last(make_client):
    client = make_client(max_body_bytes=100)
    body = json.dumps({"texts": ["a"]}).encode() + b"\n" + b"x" * 101
    *_, last = lines_of(client.post("/v1/encodings", content=body, headers=NDJSON).content)
    assert last == {"detail": "a body must have at most 100 bytes, but has more; send fewer documents at a time"}
    many = b"\n".join([json.dumps({"texts": ["a"]}).encode()] * 50)
    assert len(lines_of(client.post("/v1/encodings", content=many, headers=NDJSON).content)) == 50


def test_a_stream_that_stops_is_given_up(serve):
    url = serve(body_seconds=0.3)

    def body():
        yield json.dumps({"texts": ["a"]}).encode() + b"\n"
        time.sleep(1)
        yield b"\n"

    first, last = lines_of(httpx.post(f"{url}/v1/encodings", content=body(), headers=NDJSON).content)
    assert len(first["encodings"]) == 1
    assert last == {"detail": "a stream must go on within 0.3 seconds"}


def test_a_stream_needs_the_key_too(make_client, key):
    client = make_client(api_key_env="KALM_TEST_KEY")
    assert client.post("/v1/encodings", content=b"{}", headers=NDJSON).status_code == 401


def test_a_failure_ends_a_stream_with_a_line(make_client, monkeypatch):
    async def fail(self, texts, show_progress=False):
        msg = "secret"
        raise RuntimeError(msg)

    monkeypatch.setattr(FakeReranker, "aencode_to_metadata", fail)
    body = b"\n".join([json.dumps({"texts": ["a"]}).encode()] * 3)
    answer = make_client().post("/v1/encodings", content=body, headers=NDJSON)
    assert lines_of(answer.content) == [{"detail": "the service failed; its log says why"}]


def test_answers_come_while_a_stream_is_sent(serve):
    """A client that reads while it sends can be of any length: here each line waits for the answer of the one before."""
    url = serve()
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), 30) as client, client.makefile("rb") as answers:
        head = "POST /v1/encodings HTTP/1.1\r\nHost: a\r\nContent-Type: application/x-ndjson\r\n"
        head += "Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        client.sendall(head.encode())
        for n in range(5):
            line = json.dumps({"texts": [f"text {n}"]}).encode() + b"\n"
            client.sendall(f"{len(line):x}\r\n".encode() + line + b"\r\n")
            while b"kalm_encoding" not in (read := answers.readline()):
                assert read
        client.sendall(b"0\r\n\r\n")
        assert answers.read().endswith(b"0\r\n\r\n")
    assert number(url, "kalm_passages_encoded_total") == 5


def test_a_client_that_reads_no_answers_is_given_up(serve):
    url = serve(body_seconds=0.5)
    host, _, port = url.removeprefix("http://").partition(":")
    line = json.dumps({"texts": ["otter"] * 1000}).encode() + b"\n"
    chunk = f"{len(line):x}\r\n".encode() + line + b"\r\n"
    with socket.create_connection((host, int(port)), 30) as client:
        head = "POST /v1/encodings HTTP/1.1\r\nHost: a\r\nContent-Type: application/x-ndjson\r\n"
        client.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        client.settimeout(0.3)

        def send_for_ever():
            while True:
                client.sendall(chunk)

        with pytest.raises(TimeoutError):
            send_for_ever()
        until(lambda: number(url, "kalm_requests_in_progress") == 1)  # this request for the number
