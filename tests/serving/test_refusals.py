"""What is not answered: wrong keys and bodies, too much, too slow, too late; and clients that hang up."""

from __future__ import annotations

import json
import logging
import socket
import threading

import httpx
import pytest
from fastapi.testclient import TestClient
from tools.holding import Held
from tools.services import number
from tools.waiting import until

from kalm_integrations.errors import CheckpointNotFoundError, OutOfMemoryError, SettingsError
from kalm_integrations.serving import guard
from kalm_integrations.serving.app import create_app
from kalm_integrations.serving.settings import ServiceSettings
from kalm_integrations.testing import FakeReranker

BODY = {"query": "otters", "documents": ["otters eat crabs", "the Rhine"]}


def detail(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert list(response.json()) == ["detail"]
    return response.json()["detail"]


# --- keys


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer ", "Bearer wrong", "wrong", "Basic {key}", "Bearer {key}x", "ü"]
)
def test_a_wrong_key_opens_nothing(make_client, key, given):
    client = make_client(api_key_env="KALM_TEST_KEY")
    headers = {} if given is None else {b"authorization": given.format(key=key).encode("latin-1")}
    for path in client.get("/openapi.json").json()["paths"]:
        if path not in ("/health", "/ready"):
            refused = client.request("GET" if "rerank" not in path else "POST", path, headers=headers)
            assert "Authorization must be" in detail(refused, 401)
            assert refused.headers["www-authenticate"] == "Bearer"
    assert client.get("/health").status_code == client.get("/ready").status_code == 200


@pytest.mark.parametrize("given", ["Bearer {key}", "bearer  {key} ", "{key}"])
def test_the_key_opens_everything(make_client, key, given):
    client = make_client(api_key_env="KALM_TEST_KEY")
    headers = {"authorization": given.format(key=key)}
    assert client.post("/v2/rerank", json=BODY, headers=headers).status_code == 200
    assert client.get("/metrics", headers=headers).status_code == 200


# --- bodies


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({**BODY, "query": ""}, "query: must hold a word at least, but is empty"),
        ({**BODY, "query": " \n"}, "query: must hold a word at least, but is empty"),
        ({**BODY, "query": 3}, "query: Input should be a valid string"),
        ({"query": "a"}, "documents: Field required"),
        ({**BODY, "documents": "otters"}, "documents: Input should be a valid list"),
        ({**BODY, "documents": [{"title": "a"}]}, "documents.0: must be a string, or an object whose `text` is one"),
        ({**BODY, "documents": [{"image": "http://a/b.png"}]}, "documents.0: must be a string"),
        ({**BODY, "documents": [1] * 99}, "; and 96 more"),
        ({**BODY, "top_n": -1}, "top_n: Input should be greater than or equal to 0"),
        ({**BODY, "max_tokens_per_doc": 0}, "max_tokens_per_doc: Input should be greater than or equal to 1"),
        ({**BODY, "instruction": "x" * 20_000}, "instruction"),
        ([], "Input should be a valid dictionary"),
    ],
)
def test_a_wrong_body_says_what_is_wrong_in_few_words(make_client, body, message):
    said = detail(make_client().post("/v2/rerank", json=body), 422)
    assert message in said
    assert len(said) < 500


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b'{"query": NaN', b"9" * 5000])
def test_what_is_no_json_is_refused(make_client, content):
    for path in ("/v2/rerank", "/rerank", "/v1/score", "/v1/encodings"):
        response = make_client().post(path, content=content, headers={"content-type": "application/json"})
        assert response.status_code in (400, 422)
        assert isinstance(response.json()["detail"], str)


def test_json_that_does_not_say_so_is_refused(make_client):
    said = detail(make_client().post("/v2/rerank", content=json.dumps(BODY), headers={"content-type": "text/plain"}), 422)
    assert said == "the body must be JSON, with the header Content-Type: application/json"


def test_an_unknown_model_path_and_method(make_client):
    client = make_client(model_names=("rerank-v3.5",))
    for path in ("/v2/rerank", "/v1/rerank", "/rerank"):
        said = detail(client.post(path, json={**BODY, "model": "gpt"}), 404)
        assert said == "model must be one of fake, rerank-v3.5, but got 'gpt'"
    detail(client.get("/v3/rerank"), 404)
    detail(client.get("/v2/rerank"), 405)


def test_ten_thousand_documents(make_client):
    many = [f"otters {n}" for n in range(10_000)]
    refused = make_client().post("/v2/rerank", json={"query": "otters", "documents": many})
    assert detail(refused, 413) == "a request must hold at most 1,000 texts, but holds 10,000; send several"
    assert detail(make_client().post("/v1/encodings", json={"texts": many}), 413)
    assert detail(make_client().post("/v1/score", json={"query": "a", "passages": [{"text": text} for text in many]}), 413)
    taken = make_client(max_documents=10_000).post("/v2/rerank", json={"query": "otters", "documents": many})
    assert len(taken.json()["results"]) == 10_000


def test_a_body_of_50_mb(serve):
    """Refused whether its length is announced or not, in a way that the sender gets to read."""
    url = serve()
    body = json.dumps({"query": "otters", "documents": ["x" * 10**6] * 50}).encode()
    headers = {"content-type": "application/json"}
    for content in (body, (body[start : start + 2**16] for start in range(0, len(body), 2**16))):
        said = detail(httpx.post(f"{url}/v2/rerank", content=content, headers=headers, timeout=60), 413)
        assert said == "a body must have at most 33,554,432 bytes, but has more; send fewer documents at a time"
    assert httpx.post(f"{url}/v2/rerank", json=BODY).status_code == 200


def test_bodies_that_wait_are_bounded_together(serve, make_reranker, monkeypatch):
    monkeypatch.setattr(guard, "BODIES", 2)
    reranker = make_reranker()
    url = serve(reranker, max_body_bytes=1000)
    body = json.dumps({**BODY, "query": "o" * 850}).encode()
    with Held(reranker), connect(url) as one, connect(url) as two:
        for client in (one, two):
            client.sendall(head("/v2/rerank", len(body)) + body)
        until(lambda: number(url, "kalm_requests_in_progress") == 3)  # with this request
        refused = httpx.post(f"{url}/v2/rerank", content=body, headers={"content-type": "application/json"})
        assert detail(refused, 429) == "too many bytes of bodies wait for their answers; ask again soon"
        assert refused.headers["retry-after"] == "1"
    until(lambda: httpx.post(f"{url}/v2/rerank", json={**BODY, "query": "o" * 800}).status_code == 200)


# --- time


def connect(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), 30)


def head(path: str, length: int, kind: str = "application/json") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n".encode()


def test_a_body_that_drips_is_given_up(serve):
    url = serve(body_seconds=0.3)
    with connect(url) as client:
        client.sendall(head("/v2/rerank", 1000) + b'{"query"')
        answer = b""
        while b"}" not in answer:
            answer += client.recv(2**16)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"a body must arrive within 0.3 seconds" in answer
    assert httpx.post(f"{url}/v2/rerank", json=BODY).status_code == 200


def test_slow_clients_keep_nobody_waiting(serve):
    url = serve()
    clients = [connect(url) for _ in range(50)]
    for client in clients:
        client.sendall(head("/v2/rerank", 1000) + b"{")
    assert httpx.post(f"{url}/v2/rerank", json=BODY).status_code == 200
    for client in clients:
        client.close()
    until(lambda: number(url, "kalm_requests_total", status="499") == 50)


def test_a_client_that_hangs_up_is_computed_nothing_for(serve, make_reranker):
    reranker = make_reranker()
    url = serve(reranker)
    engine = reranker.runtime.engine
    score, texts = {"query": "a", "passages": [{"text": "b"}]}, {"texts": ["a", "b"]}
    bodies = {"/v2/rerank": BODY, "/v1/rerank": BODY, "/rerank": BODY, "/v1/score": score, "/v1/encodings": texts}
    with Held(reranker):
        idle = engine.n_queued
        for path, of_path in bodies.items():
            body = json.dumps(of_path).encode()
            with connect(url) as client:
                client.sendall(head(path, len(body)) + body)
                until(lambda: engine.n_queued > idle)
            until(lambda: engine.n_queued == idle)
    until(lambda: number(url, "kalm_requests_total", status="499") == len(bodies))
    assert reranker.stats.passages_encoded == reranker.stats.passages_scored == 0
    assert httpx.post(f"{url}/v2/rerank", json=BODY).status_code == 200


def test_an_answer_that_comes_too_late(make_client, make_reranker):
    reranker = make_reranker()
    client = make_client(reranker, timeout=0.05)
    with Held(reranker):
        assert "timeout=0.05" in detail(client.post("/v2/rerank", json=BODY), 504)
        assert "within 0.05 seconds" in detail(client.post("/v1/encodings", json={"texts": ["a"]}), 504)
        assert detail(client.post("/v1/score", json={"query": "a", "passages": [{"text": "b"}]}), 504)


def test_a_queue_that_is_full(make_client, make_reranker):
    reranker = make_reranker(max_queued_pairs=2)
    client = make_client(reranker, timeout=30)
    with Held(reranker):
        refused = client.post("/v2/rerank", json={**BODY, "documents": ["a", "b", "c"]})
        assert "max_queued_pairs" in detail(refused, 429)
        assert refused.headers["retry-after"] == "1"


# --- models


def test_while_the_model_is_loaded_all_else_is_answered(monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(FakeReranker, "warm_up", lambda self: gate.wait(30))
    app = create_app(ServiceSettings.make(model="fake"), lambda _: FakeReranker())
    with TestClient(app) as client:
        assert client.get("/health").status_code == client.get("/v1/models").status_code == 200
        for refused in (
            client.get("/ready"),
            client.get("/v1/kalm"),
            client.post("/v2/rerank", json=BODY),
            client.post("/v1/encodings", json={"texts": ["a"]}),
            client.post("/v1/encodings", content='{"texts": ["a"]}', headers={"content-type": "application/x-ndjson"}),
        ):
            assert detail(refused, 503) == "the model is still being loaded; ask again soon"
            assert refused.headers["retry-after"] == "2"
        gate.set()
        until(lambda: client.get("/ready").status_code == 200)
        assert client.post("/v2/rerank", json=BODY).status_code == 200


def test_a_model_that_cannot_be_opened_is_told_to_who_runs_it():
    def fail(_settings):
        msg = "no folder /secret"
        raise CheckpointNotFoundError(msg)

    failures = []
    app = create_app(ServiceSettings.make(model="fake"), fail, on_failure=failures.append)
    with TestClient(app) as client:
        until(lambda: failures)
        assert detail(client.get("/ready"), 503) == "the service failed; its log says why"
    assert [str(failure) for failure in failures] == ["no folder /secret"]


@pytest.mark.parametrize("error", [OutOfMemoryError("secret"), RuntimeError("secret")])
def test_what_a_client_can_do_nothing_about_is_logged_not_told(make_client, monkeypatch, caplog, error):
    client = make_client()

    def fail(self, request):
        raise error

    monkeypatch.setattr(FakeReranker, "answer", fail)
    assert detail(client.post("/v2/rerank", json=BODY), 500) == "the service failed; its log says why"
    assert "secret" in caplog.text


def test_a_key_that_is_not_there_is_refused_at_the_start(monkeypatch):
    monkeypatch.setenv("KALM_TEST_KEY", " ")
    for name in ("KALM_TEST_KEY", "KALM_NO_SUCH_KEY"):
        with pytest.raises(SettingsError, match=f"'{name}' is unset or empty"):
            create_app(ServiceSettings.make(model="fake", api_key_env=name), lambda _: FakeReranker())


# --- logs


def test_the_access_log_has_numbers_and_no_texts(make_client, make_reranker, key, caplog):
    caplog.set_level(logging.DEBUG)
    client = make_client(make_reranker(), api_key_env="KALM_TEST_KEY")
    body = {"query": "SECRETQUERY", "documents": ["SECRETTEXT one", "SECRETTEXT two"], "instruction": "SECRETRULE"}
    headers = {"authorization": f"Bearer {key}"}
    caplog.clear()
    for documents in (body["documents"], [*body["documents"], "SECRETTEXT three"]):
        client.post("/v2/rerank", json={**body, "documents": documents}, headers=headers)
    client.post("/v2/rerank", json={**body, "top_n": "SECRETTEXT"}, headers=headers)
    client.post("/v2/rerank?key=SECRETTEXT", json=body, headers={"authorization": "SECRETTEXT"})
    client.post("/v1/encodings", json={"texts": ["SECRETTEXT"]}, headers=headers)
    # The client of these tests logs the addresses that it asks for.
    records = [record for record in caplog.records if not record.name.startswith("httpx")]
    said = "\n".join(record.getMessage() for record in records)
    assert "SECRET" not in said
    assert key not in said
    lines = [json.loads(record.getMessage()) for record in records if record.name == "kalm_integrations.access"]
    for line in lines:
        assert line.pop("seconds") >= 0
    post = {"method": "POST", "path": "/v2/rerank"}
    assert lines == [
        {**post, "status": 200, "n_documents": 2, "n_found": 0, "n_encoded": 2},
        {**post, "status": 200, "n_documents": 3, "n_found": 2, "n_encoded": 1},
        {**post, "status": 422},
        {**post, "status": 401},
        {"method": "POST", "path": "/v1/encodings", "status": 200, "n_documents": 1},
    ]
