"""Ray Serve: two replicas that share a store, one of them killed under load; and what the settings become."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from importlib import import_module

import httpx
import psutil
import pytest
import torch
from ray import serve
from tools.clusters import ray_cluster
from tools.collector import collecting
from tools.servers import free_port
from tools.waiting import until

from kalm_integrations import Passage, RemoteReranker
from kalm_integrations.errors import MissingExtraError, SettingsError
from kalm_integrations.serving.ray import Replica, build
from kalm_integrations.serving.settings import ServiceSettings

TEXTS = [f"passage {i} of the corpus" for i in range(20)]
ENOUGH_SECONDS = 90.0


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("ray-store")


@pytest.fixture(scope="module")
def collector():
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def url(tiny_checkpoint, store, collector):
    """Where two replicas answer, which share a store and send spans."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in collector.environment.items():
            patch.setenv(name, value)
        port = free_port()
        with ray_cluster(2):
            try:
                serve.start(http_options={"host": "127.0.0.1", "port": port})
                arguments = {"model": str(tiny_checkpoint), "store": str(store), "min_replicas": "2", "max_replicas": "2"}
                serve.run(build({**arguments, "traces": "true", "model_settings": {"storage_codec": "fp32"}}))
                yield f"http://127.0.0.1:{port}"
            finally:
                serve.shutdown()


@pytest.fixture
def client(url):
    with httpx.Client(base_url=url, timeout=ENOUGH_SECONDS) as client:
        yield client


def rerank(client, query="who?", texts=TEXTS):
    """Return the order; what a replica was doing when it died is asked for once more."""
    for _ in range(2):
        answer = client.post("/v1/rerank", json={"query": query, "documents": texts})
        if answer.status_code == 200:
            return [result["index"] for result in answer.json()["results"]]
    raise AssertionError(answer.text)


def numbers(client):
    """Return what one of the replicas has counted, and its process, which tells it from the others."""
    lines = client.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def of_all_replicas(client, texts=TEXTS):
    """Have both replicas answer, and return what they have counted: passages encoded, by process."""
    encoded = {}

    def have_answered():
        rerank(client, texts=texts)
        seen = numbers(client)
        if seen["kalm_pairs_scored_total"]:
            encoded[seen["kalm_process_id"]] = seen["kalm_passages_encoded_total"]
        return len(encoded) == 2

    until(have_answered, ENOUGH_SECONDS)
    return encoded


def processes():
    return [child for child in psutil.Process().children(recursive=True) if "ServeReplica" in child.cmdline()[0]]


def test_what_one_replica_has_encoded_the_other_finds(client, store, make_reranker):
    # A request that a replica is too slow for as it starts is made again, maybe to the other one: both are awake first.
    before = of_all_replicas(client, ["what wakes them"])
    order = rerank(client)
    with_store = make_reranker(payload_store=store)
    until(lambda: set(with_store.read([Passage(text) for text in TEXTS])) == {"found"}, ENOUGH_SECONDS)
    after = of_all_replicas(client)
    assert sorted(after[name] - before[name] for name in before) == [0, len(TEXTS)]
    assert order == [passage.index for passage in with_store.rank("who?", TEXTS)]


def test_a_replica_that_is_killed_loses_no_request(client, url, store):
    before = of_all_replicas(client)
    asked, answered, is_over = Counter(), Counter(), threading.Event()

    def load(name):
        # Every other one is our own client, which asks once more by itself.
        remote = RemoteReranker(url, timeout=ENOUGH_SECONDS, max_retries=1)
        with httpx.Client(base_url=url, timeout=ENOUGH_SECONDS) as own:
            while not is_over.is_set():
                asked[name] += 1
                query = f"query {asked[name]} of {name}"
                answered[name] += len(remote.rank(query, TEXTS) if name % 2 else rerank(own, query)) == len(TEXTS)

    threads = [threading.Thread(target=load, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: len(answered) == len(threads), ENOUGH_SECONDS)
    processes()[0].kill()
    # The one that takes its place begins with an empty memory, and finds in the store what was encoded.
    until(lambda: set(of_all_replicas(client)) - set(before), ENOUGH_SECONDS)
    is_over.set()
    for thread in threads:
        thread.join()
    assert asked == answered
    [encoded] = [encoded for process, encoded in of_all_replicas(client).items() if process not in before]
    assert encoded == 0


def test_a_trace_goes_on_in_a_replica(client, collector):
    trace = "0af7651916cd43dd8448eb211c80319c"
    body = {"query": "who?", "documents": TEXTS}
    client.post("/v1/rerank", json=body, headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"}).raise_for_status()
    until(lambda: trace in {span.trace_id.hex() for span in collector.spans if span.name == "kalm.rank"}, ENOUGH_SECONDS)


# --- settings


def test_settings_come_from_arguments_and_the_environment(monkeypatch):
    environment = ServiceSettings.make(model="pico", shutdown_seconds=7, store="elsewhere").to_env()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    deployment = build({"num_cpus": "2", "num_gpus": "0.25", "max_replicas": "8", "store": "here"})._bound_deployment
    assert deployment.ray_actor_options == {"num_cpus": 2.0, "num_gpus": 0.25}
    config = deployment._deployment_config
    assert (config.autoscaling_config.min_replicas, config.autoscaling_config.max_replicas) == (1, 8)
    assert config.graceful_shutdown_timeout_s == 7
    app = import_module("kalm_integrations.serving.ray").app
    assert app._bound_deployment.ray_actor_options == {"num_cpus": 1.0, "num_gpus": 0.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_gpu": 1}, "num_gpu"),
        ({"num_cpus": 0}, "num_cpus"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas must not be less than min_replicas=3, but is 2"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(SettingsError, match=message):
        build(arguments)


def test_a_replica_whose_gpu_is_lost_is_not_healthy(monkeypatch):
    Replica().check_health()

    def fail(*_, **__):
        msg = "CUDA error: an illegal memory access was encountered"
        raise RuntimeError(msg)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        Replica().check_health()


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "kalm_integrations.serving.ray")
    with pytest.raises(MissingExtraError, match=r'pip install "kalm-integrations\[ray\]"'):
        import_module("kalm_integrations.serving.ray")
