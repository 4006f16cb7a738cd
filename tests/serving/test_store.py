"""A service with a store: what was encoded once is found by its text, after any end of the process and by other processes."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import httpx
import pytest
from tools.servers import redis
from tools.services import Running, kalm_serve, number
from tools.waiting import until

from kalm_integrations import KalmReranker
from kalm_integrations.serving.service import open_kalm
from kalm_integrations.serving.settings import ServiceSettings

QUERY = "which otter is it?"


def texts(kind: str, n: int = 20) -> list[str]:
    return [f"otter number {i} of kind {kind}" for i in range(n)]


def ask(service: Running, documents: list[str]) -> dict[int, float]:
    body = {"query": QUERY, "documents": documents}
    answer = httpx.post(f"{service.url}/v2/rerank", json=body, timeout=60).raise_for_status().json()
    return {result["index"]: result["relevance_score"] for result in answer["results"]}


def found(service: Running) -> float:
    return number(service.url, "kalm_encodings_found_total", where="store")


def wait_for(service: Running, n_written: int) -> None:
    until(lambda: number(service.url, "kalm_store_writes_total") >= n_written, 60)


@pytest.fixture
def right() -> KalmReranker:
    return KalmReranker.from_pretrained("pico")


def assert_right(scores: dict[int, float], documents: list[str], right: KalmReranker) -> None:
    assert [scores[index] for index in range(len(documents))] == pytest.approx(right.score(QUERY, documents), abs=1e-6)


def test_kill_9_under_load_loses_no_stored_encoding(tmp_path: Path, right):
    store = tmp_path / "store"
    with kalm_serve(tmp_path, "--store", store) as service:
        ask(service, texts("a"))
        wait_for(service, 20)
        assert number(service.url, "kalm_store_bytes") > 0

        def load(n: int) -> None:
            for i in range(1000):
                try:
                    ask(service, texts(f"load {n} {i}"))
                except httpx.HTTPError:
                    return

        threads = [threading.Thread(target=load, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        wait_for(service, 100)
        service.process.kill()
        for thread in threads:
            thread.join()
        assert service.process.wait(60) == -signal.SIGKILL
    with kalm_serve(tmp_path, "--store", store) as service:
        assert_right(ask(service, texts("a")), texts("a"), right)
        assert service.encoded() == 0
        assert found(service) == 20
        # What was being written is either there or not, and right in both cases.
        for n in range(3):
            for i in range(2):
                assert_right(ask(service, texts(f"load {n} {i}")), texts(f"load {n} {i}"), right)
        # A signal to stop waits until all is written.
        ask(service, texts("b"))
        assert httpx.post(f"{service.url}/v1/encodings", json={"texts": texts("c")}, timeout=60).status_code == 200
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(60) == 0
    with kalm_serve(tmp_path, "--store", store) as service:
        for kind in ("a", "b", "c"):
            assert_right(ask(service, texts(kind)), texts(kind), right)
        assert service.encoded() == 0
        assert found(service) == 60


def test_what_a_client_sends_is_not_stored(make_client, make_reranker, tmp_path):
    store = tmp_path / "store"
    [metadata] = make_reranker().encode_to_metadata(texts("a", 1))
    passages = [{"text": texts("a", 1)[0], "encoding": metadata["kalm_encoding"]}]
    reranker = make_reranker(payload_store=store, write_through=True)
    client = make_client(reranker)
    answer = client.post("/v1/score", json={"query": QUERY, "passages": passages, "client": "alice"}).json()
    assert answer["statuses"] == ["stored"]
    assert reranker.flush(60)
    other = make_reranker(payload_store=store)
    assert list(other.read(texts("a", 1))) == ["missing"]
    assert client.post("/v2/rerank", json={"query": QUERY, "documents": texts("a", 1)}).status_code == 200
    assert reranker.flush(60)
    assert list(make_reranker(payload_store=store).read(texts("a", 1))) == ["found"]
    assert client.post("/v1/score", json={"query": QUERY, "passages": [{"text": texts("a", 1)[0]}]}).json()["statuses"]


def test_services_share_a_redis(tiny_checkpoint, tmp_path):
    with redis(tmp_path) as (url, _):
        given = ServiceSettings.make(model=str(tiny_checkpoint), store=url)
        one = open_kalm(given)
        one.rank(QUERY, texts("a"))
        assert one.flush(60)
        other = open_kalm(given)
        assert other.read(texts("a")).counts["found"] == 20
        assert other.score(QUERY, texts("a")) == pytest.approx(one.score(QUERY, texts("a")), abs=1e-6)
        assert other.stats.passages_encoded == 0
