"""One contract for a service as model, under all hosts: what a reranker in the process gives, and no model in it."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import pickle
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from haystack import Pipeline
from haystack.utils import Secret
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.vectorstores import InMemoryVectorStore
from tools.hosts import HOSTS, Host
from tools.paths import ROOT
from tools.services import in_process
from tools.stub_service import serve

from kalm_integrations import RemoteReranker, haystack, langchain
from kalm_integrations.errors import EncodingError, ServiceError, SettingsError
from kalm_integrations.hosting import as_reranker, wait_for_write_back
from kalm_integrations.serving.app import create_app
from kalm_integrations.serving.settings import ServiceSettings
from kalm_integrations.testing import FakeReranker

TEXTS = ["The Panthers defense gave up just 308 points.", "Lift and drag of a slender wing.", "naïve café 東京", "a"]
QUERY = "who won the super bowl?"
SECONDS = 20


@pytest.fixture(params=HOSTS, ids=lambda host: host.name)
def host(request) -> Host:
    return request.param


@pytest.fixture
def behind(make_reranker):
    """The reranker behind the service."""
    return make_reranker()


@pytest.fixture
def url(behind):
    """A service on the tiny checkpoint."""
    with in_process(create_app(ServiceSettings.make(model="tiny"), lambda _: behind)) as url:
        yield url


@pytest.fixture
def dead_url():
    """Nobody answers there."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def documents(host: Host, texts=TEXTS):
    return [host.document(f"id-{i}", text, {"page": i}) for i, text in enumerate(texts)]


def outcome(host: Host, ranked):
    """Return what can be compared of an answer: keys, and the rest with its numbers."""
    return [host.key(d) for d in ranked], [{"score": host.score(d), **host.metadata(d)} for d in ranked]


def like(given):
    """Return an outcome that is equal to one with nearly the same numbers."""
    keys, rest = given
    return keys, [pytest.approx(row, abs=1e-6) for row in rest]


# --- the same as with the model


def test_documents_come_back_as_from_a_reranker_in_the_process(host, url, make_reranker):
    given = documents(host)
    before = copy.deepcopy(given)
    expected = outcome(host, host.use(host.reranker(model=make_reranker(), **{host.top: 3}), QUERY, given))
    component = host.reranker(model=url, **{host.top: 3})
    assert outcome(host, host.use(component, QUERY, given)) == like(expected)
    assert outcome(host, asyncio.run(host.ause(component, QUERY, given))) == like(expected)
    assert given == before
    assert isinstance(component.reranker, RemoteReranker)


def test_fused_rankings_are_the_same(host, url, make_reranker):
    scores = (1.0, 9.0, 5.0, 2.0)
    retrieved = [host.retrieved(document, score) for document, score in zip(documents(host), scores, strict=True)]
    for settings in ({"fusion": "z_score", "fusion_weight": 0.4}, {"fusion": "reciprocal_rank"}):
        expected = outcome(host, host.fuse(make_reranker(), QUERY, retrieved, **settings))
        assert outcome(host, host.fuse(url, QUERY, retrieved, **settings)) == like(expected)


def test_sentences_are_told_and_pruned_as_by_a_reranker_in_the_process(host, url, make_reranker):
    text = "The Panthers defense gave up just 308 points.  Who won the super bowl?\nNobody knows \ud83d\ude00. A slender wing."
    settings = {"highlight": True, "prune": True, "prune_threshold": 0.9}
    given = [host.document("id", text, {})]
    [expected] = host.use(host.reranker(model=make_reranker(), **settings), QUERY, given)
    [found] = host.use(host.reranker(model=url, **settings), QUERY, given)
    assert host.text(found) == host.text(expected) != text
    told, wanted = host.metadata(found), host.metadata(expected)
    assert told["kept_spans"] == wanted["kept_spans"]
    assert told["relevant_spans"] == [pytest.approx(span, abs=1e-6) for span in wanted["relevant_spans"]]
    assert len(wanted["relevant_spans"]) == 4


def test_encoders_give_what_the_service_makes_and_keep_what_is_valid(host, url, behind, make_reranker):
    expected = host.encode(host.encoder(model=make_reranker()), documents(host))
    encoder = host.encoder(model=url)
    assert host.encode(encoder, documents(host)) == expected
    n_encoded = behind.stats.passages_encoded
    mixed = [*expected[:2], *documents(host)[2:]]
    assert host.encode(encoder, mixed) == asyncio.run(host.aencode(encoder, mixed)) == expected
    assert behind.stats.passages_encoded == n_encoded == len(TEXTS)


def test_encodings_of_documents_travel_to_a_service_that_has_none(host, url, behind, make_reranker):
    stored = host.ingest(make_reranker(), documents(host))
    ranked = host.use(host.reranker(model=url, **{host.top: 3}), QUERY, stored)
    assert len(ranked) == 3
    assert not any(key.startswith("kalm") for document in ranked for key in host.metadata(document))
    assert (behind.stats.passages_encoded, behind.stats.metadata_hits) == (0, len(TEXTS))


def test_an_encoding_serves_only_documents_that_came_with_it(host, url, make_reranker):
    """Who can write one store decides nothing about the documents of another, of the same process and text either."""
    [sound] = make_reranker().encode_passages(TEXTS[:1])
    forged = host.document("id-0", TEXTS[0], {"kalm_encoding": replace(sound, states=-sound.states).to_metadata()})
    component, right = host.reranker(model=url), pytest.approx(make_reranker().score(QUERY, TEXTS[:1])[0], abs=1e-6)
    for _ in range(2):
        [ranked] = host.use(component, QUERY, [forged])
        assert host.score(ranked) != right
    for given in (host.ingest(make_reranker(), documents(host, TEXTS[:1])), documents(host, TEXTS[:1])):
        [ranked] = host.use(component, QUERY, given)
        assert host.score(ranked) == right


def test_documents_without_a_valid_encoding_are_written_back(host, url, make_reranker):
    written = []
    encoded = host.encode(host.encoder(model=make_reranker()), documents(host, [*TEXTS[:3], "another text"]))
    given = [encoded[0], *documents(host)[1:3], host.with_text(encoded[3], TEXTS[3])]
    component = host.reranker(model=url, write_back=written.extend, **{host.top: 1})
    for answer in (host.use(component, QUERY, given), asyncio.run(host.ause(component, QUERY, given))):
        assert len(answer) == 1
        assert wait_for_write_back(SECONDS)
    made = RemoteReranker(url).encode_to_metadata(TEXTS[1:])
    expected = {"id-1": made[0], "id-2": made[1], "id-3": made[2]}
    assert len(written) == 6
    for document in written:
        assert expected[host.key(document)].items() <= host.metadata(document).items()


def test_missing_encodings_are_an_error_if_they_shall_be(host, url, make_reranker):
    stored = host.ingest(make_reranker(), documents(host))
    component = host.reranker(model=url, on_missing="error")
    for timeout in (None, SECONDS):
        component.timeout = timeout
        assert len(host.use(component, QUERY, stored)) > 0
        assert len(asyncio.run(host.ause(component, QUERY, stored))) > 0
        with pytest.raises(EncodingError, match=r"1 of 4 do not, the first being id-0"):
            host.use(component, QUERY, [*documents(host)[:1], *stored[1:]])
    with pytest.raises(EncodingError, match=r"id-1 \(stale\)"):
        host.use(component, QUERY, [stored[0], host.with_text(stored[1], "changed"), *stored[2:]])


def test_a_store_is_asked_once_for_encodings_that_documents_came_without(host, url, behind, make_reranker):
    held = {host.key(d): host.metadata(d)["kalm_encoding"] for d in host.ingest(make_reranker(), documents(host))}
    asked = []

    def fetch(given):
        asked.append([host.key(document) for document in given])
        return [held.get(key) for key in asked[-1]]

    component = host.reranker(model=url, fetch=fetch, on_missing="error", **{host.top: None})
    answers = [host.use(component, QUERY, documents(host)), asyncio.run(host.ause(component, "another", documents(host)))]
    assert [len(answer) for answer in answers] == [4, 4]
    assert asked == [[f"id-{i}" for i in range(4)]]
    assert behind.stats.passages_encoded == 0


def test_backfill_by_a_service(url, make_reranker):
    store = InMemoryVectorStore(DeterministicFakeEmbedding(size=4))
    store.add_documents(documents(HOSTS[0]))
    for model, n_missing in ((url, 4), (make_reranker(), 0)):
        report = langchain.backfill(store, langchain.KalmPassageEncoder(model=model), show_progress=False)
        assert (report.n_checked, report.n_missing, report.n_stale) == (4, n_missing, 0)


# --- when it is not there


def test_a_dead_service_keeps_the_order_or_is_an_error(host, dead_url):
    component = host.reranker(model=dead_url, timeout=0.3, on_error="keep_order", **{host.top: 3})
    for extra in ({}, {"on_missing": "error"}, {"fetch": lambda given: [None for _ in given]}):
        for name, value in extra.items():
            setattr(component, name, value)
        for answer in (host.use(component, QUERY, documents(host)), asyncio.run(host.ause(component, QUERY, documents(host)))):
            assert [host.key(document) for document in answer] == ["id-0", "id-1", "id-2"]
            assert all(host.metadata(document)["reranked"] is False for document in answer)
    component.on_error, component.timeout = "raise", None
    component.reranker._to = RemoteReranker(dead_url, max_retries=0)._to
    with pytest.raises(ServiceError, match="must be reached"):
        host.use(component, QUERY, documents(host))


@pytest.mark.parametrize("asks", [{}, {"on_missing": "error"}, {"fetch": lambda given: [None for _ in given]}], ids=str)
def test_a_service_that_hangs_takes_no_more_than_the_time_out(host, asks):
    with serve(FakeReranker()) as service:
        service.instead.extend([lambda handler: (handler.rfile.read(1) and None) or (0, {}, b"")] * 2)
        component = host.reranker(model=service.url, timeout=0.3, on_error="keep_order", **asks)
        started = time.monotonic()
        assert host.metadata(host.use(component, QUERY, documents(host))[0])["reranked"] is False
        assert host.metadata(asyncio.run(host.ause(component, QUERY, documents(host)))[0])["reranked"] is False
        assert time.monotonic() - started < SECONDS


# --- settings


@pytest.mark.parametrize(
    "settings",
    [{"device": "cpu"}, {"compression_ratio": 8}, {"storage_codec": "int8"}, {"model_kwargs": {"payload_store": "folder"}}],
    ids=str,
)
def test_what_the_service_decides_is_refused_beside_it(host, settings):
    for make in (host.reranker, host.encoder):
        with pytest.raises(SettingsError, match=r"a service given as model brings its own settings.*`kalm serve`"):
            make(model="http://localhost:1", **settings)
    with pytest.raises(SettingsError, match="brings its own settings"):
        as_reranker("https://host", **({} if "model_kwargs" in settings else settings), cache_bytes=5)


def test_an_address_with_a_password_is_refused_and_not_shown(host):
    for make in (host.reranker, host.encoder):
        with pytest.raises(SettingsError, match="KALM_API_KEY") as caught:
            make(model="http://user:hunter2@host")
        assert "hunter2" not in str(caught.value)


def test_the_instruction_goes_with_the_query(host):
    with serve(FakeReranker()) as service:
        host.use(host.reranker(model=service.url, instruction="Find the opposite."), QUERY, documents(host))
        assert service.sent("/v1/score")[0]["instruction"] == "Find the opposite."


def test_keys_and_tokens_stay_where_they_belong(host, monkeypatch):
    """The service's key comes from the environment, is in nothing that is written, and the hub's token is not for it."""
    monkeypatch.setenv("KALM_API_KEY", "hunter2")
    monkeypatch.setenv("HF_TOKEN", "hf_hunter3")
    with serve(FakeReranker(), key="hunter2") as service:
        extra = {"token": Secret.from_token("hf_hunter4")} if host.name == "haystack" else {}
        component = host.reranker(model=service.url, **extra)
        host.use(component, QUERY, documents(host))
        assert not any("hf_hunter" in json.dumps(request) for request in service.requests)
    component = host.reranker(model=service.url)
    assert component.reranker is not None
    shown = [json.dumps(host.dump(component)), repr(component), str(pickle.dumps(component))]
    assert not any("hunter" in text for text in shown)
    assert all(service.url in text for text in shown if "model" in text)


# --- copies, pickles, pipelines


def test_copies_share_connections_and_pickles_make_their_own(host, url, make_reranker):
    component = host.reranker(model=url, **{host.top: None})
    expected = outcome(host, host.use(component, QUERY, documents(host)))
    assert copy.deepcopy(component).reranker is copy.copy(component).reranker is component.reranker
    again = pickle.loads(pickle.dumps(component))
    assert outcome(host, host.use(again, QUERY, documents(host))) == like(expected)
    assert again.reranker is not component.reranker
    component.model = make_reranker()
    assert outcome(host, host.use(component, QUERY, documents(host))) == like(expected)


def test_a_pipeline_from_yaml_asks_the_service(url):
    pipeline = Pipeline()
    pipeline.add_component("ranker", haystack.KalmRanker(model=url, top_k=2))
    pipeline.add_component("encoder", haystack.KalmDocumentEncoder(model=url, progress_bar=False))
    again = Pipeline.loads(pipeline.dumps())
    given = documents(HOSTS[2])
    made = again.run({"ranker": {"query": QUERY, "documents": given}, "encoder": {"documents": given}})
    assert len(made["ranker"]["documents"]) == 2
    assert all("kalm_encoding" in document.meta for document in made["encoder"]["documents"])
    assert type(again.get_component("ranker").reranker) is RemoteReranker


# --- processes without a model

LIGHT = {
    "langchain": """
from langchain_core.documents import Document
from kalm_integrations.langchain import KalmPassageEncoder, KalmRerank
given = [Document(id=str(i), page_content=text) for i, text in enumerate(texts)]
encoded = KalmPassageEncoder(model=url).transform_documents(given)
ranked = KalmRerank(model=url).compress_documents(encoded, query)
ranked += asyncio.run(KalmRerank(model=url).acompress_documents(given, query))
found = [document.id for document in ranked]
""",
    "llama_index": """
from llama_index.core.schema import NodeWithScore, TextNode
from kalm_integrations.llama_index import KalmPassageEncoder, KalmRerank
given = [TextNode(id_=str(i), text=text) for i, text in enumerate(texts)]
encoded = [NodeWithScore(node=node) for node in KalmPassageEncoder(url)(given)]
ranked = KalmRerank(url, top_n=3).postprocess_nodes(encoded, query_str=query)
ranked += asyncio.run(KalmRerank(url, top_n=3).apostprocess_nodes(encoded, query_str=query))
found = [node.node_id for node in ranked]
""",
    # Haystack loads torch where there is one, and does without where there is none.
    "haystack": """
sys.modules["torch"] = None
from haystack import Document
from kalm_integrations.haystack import KalmDocumentEncoder, KalmRanker
given = [Document(id=str(i), content=text) for i, text in enumerate(texts)]
encoded = KalmDocumentEncoder(model=url, progress_bar=False).run(given)["documents"]
ranked = KalmRanker(model=url, top_k=3).run(query, encoded)["documents"]
ranked += asyncio.run(KalmRanker(model=url, top_k=3).run_async(query, given))["documents"]
found = [document.id for document in ranked]
""",
}


def test_a_process_that_asks_a_service_loads_no_model(host, url, make_reranker):
    code = f"import asyncio, sys\nurl, query, texts = {url!r}, {QUERY!r}, {TEXTS!r}\n" + LIGHT[host.name]
    code += "print(*found)\nprint(*[name for name in ('torch', 'transformers', 'tokenizers') if sys.modules.get(name)])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120, env=environment, cwd=Path("/")
    )
    assert done.returncode == 0, done.stderr
    found, loaded = done.stdout.splitlines()
    expected = [str(place.index) for place in make_reranker().rank(QUERY, TEXTS, 3)]
    assert found.split() == expected * 2
    assert loaded == ""
