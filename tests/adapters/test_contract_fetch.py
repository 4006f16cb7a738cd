"""One contract for fetching under all hosts: a store is asked for what is missing, once, and harms no query."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from haystack.document_stores.in_memory import InMemoryDocumentStore
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core.storage.docstore import SimpleDocumentStore
from tools.hosts import HOSTS, Host

from kalm_integrations import haystack, langchain, llama_index
from kalm_integrations.errors import EncodingError, SettingsError
from kalm_integrations.hosting import fetching, wait_for_write_back
from kalm_integrations.hosting.stores import DocumentKind, encodings_of
from kalm_integrations.testing import FakeReranker

TEXTS = ["The Panthers defense gave up just 308 points.", "Lift and drag of a slender wing.", "naïve café 東京", "a"]
QUERY = "who won the super bowl?"
SECONDS = 20
"""How long a test waits for what must happen, before it fails."""


@pytest.fixture(params=HOSTS, ids=lambda host: host.name)
def host(request) -> Host:
    return request.param


def documents(host: Host, texts=TEXTS):
    return [host.document(f"id-{i}", text, {"page": i}) for i, text in enumerate(texts)]


def component_of(host: Host, **settings):
    return host.reranker(**{host.top: None}, **settings)


class Store:
    """Has encodings by id, and may hang before it answers."""

    def __init__(self, host: Host, model=None, texts=TEXTS) -> None:
        self.host = host
        encoded = [] if model is None else host.ingest(model, documents(host, texts))
        self.held = {host.key(document): host.metadata(document)["kalm_encoding"] for document in encoded}
        self.asked: list[list[str]] = []
        self.may_end = threading.Event()
        self.may_end.set()

    def fetch(self, given):
        self.asked.append([self.host.key(document) for document in given])
        assert self.may_end.wait(SECONDS)
        return [self.held.get(key) for key in self.asked[-1]]


@pytest.fixture
def make_reranker(make_reranker):
    """Stored without loss, so that scores tell whether the right encodings were used."""
    return functools.partial(make_reranker, storage_codec="fp32")


def scored(host: Host, answer) -> dict[str, object]:
    return {host.key(document): pytest.approx(host.score(document), abs=1e-6) for document in answer}


def ranked(host: Host, component, given) -> dict[str, object]:
    return scored(host, host.use(component, QUERY, given))


def unfetched(host: Host, model, given) -> dict[str, float]:
    """What a query gives that encodes everything."""
    return {host.key(document): host.score(document) for document in host.use(component_of(host, model=model), QUERY, given)}


def test_the_store_is_asked_once_for_what_is_neither_carried_nor_in_memory(host, make_reranker):
    store = Store(host, make_reranker())
    reranker = make_reranker()
    component = component_of(host, model=reranker, fetch=store.fetch)
    expected = unfetched(host, make_reranker(), documents(host))
    host.rerank(reranker, QUERY, documents(host, TEXTS[:1]), top=1)  # the first is in memory now
    n_encoded = reranker.stats.passages_encoded
    given = documents(host)
    given[1] = host.ingest(make_reranker(), given)[1]
    before = copy.deepcopy(given)
    assert ranked(host, component, given) == expected
    assert store.asked == [["id-2", "id-3"]]
    assert reranker.stats.passages_encoded == n_encoded
    assert given == before
    returned = host.use(component, QUERY, given)
    assert not any(key.startswith("kalm") for document in returned for key in host.metadata(document))


def test_nothing_is_asked_for_where_nothing_is_missing(host, make_reranker):
    store, reranker = Store(host), make_reranker()
    host.use(component_of(host, model=reranker, fetch=store.fetch), QUERY, host.ingest(reranker, documents(host)))
    assert store.asked == []


def test_what_was_fetched_stays_in_memory_for_the_documents_of_its_store(host, make_reranker):
    """Not for those of another: who writes to a store decides the scores of its documents only."""
    reranker = make_reranker()
    stores = [Store(host, make_reranker()), Store(host, make_reranker())]
    components = [component_of(host, model=reranker, fetch=store.fetch) for store in stores]
    for _ in range(3):
        for component in components:
            host.use(component, QUERY, documents(host))
    assert [len(store.asked) for store in stores] == [1, 1]
    assert reranker.stats.passages_encoded == 0
    host.rerank(reranker, QUERY, documents(host), top=1)
    assert reranker.stats.passages_encoded == len(TEXTS)


def test_what_a_store_answers_is_believed_no_more_than_metadata(host, make_reranker):
    """An encoding of another text, of another model, what is none, and nothing: each is encoded, and counted."""
    reranker, store = make_reranker(), Store(host, make_reranker())
    store.held["id-0"] = store.held["id-1"]
    store.held["id-1"] = Store(host, make_reranker(max_passage_tokens=7)).held["id-1"]
    store.held["id-2"] = 7
    del store.held["id-3"]
    expected = unfetched(host, make_reranker(), documents(host))
    component = component_of(host, model=reranker, fetch=store.fetch)
    assert ranked(host, component, documents(host)) == expected
    stats = reranker.stats
    assert (stats.stale, stats.corrupt, stats.passages_encoded) == (2, 1, 4)
    host.use(component, QUERY, documents(host))
    assert len(store.asked) == 1, "what is in memory is asked for again"


FAILURES = {
    "raises": (ConnectionError("the store is gone"), "ConnectionError: the store is gone"),
    "wants to end": (SystemExit(1), "SystemExit: 1"),
    "short": ([], "an encoding, or None, for each of 4 documents, but returned 0 values"),
    "nothing": (None, "but returned no list"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_store_that_fails_is_logged_once_and_left_alone_for_a_while(host, failure, caplog, monkeypatch):
    answer, message = FAILURES[failure]
    n_calls = 0

    def fetch(given):
        nonlocal n_calls
        n_calls += 1
        if isinstance(answer, BaseException):
            raise answer
        return answer

    component = component_of(host, model=FakeReranker(), fetch=fetch)
    expected = unfetched(host, FakeReranker(), documents(host))
    for _ in range(3):
        assert ranked(host, component, documents(host)) == expected
    assert n_calls == 1
    assert caplog.text.count("the encodings of 4 passages were not fetched") == 1
    assert message in caplog.text
    monkeypatch.setattr(fetching, "PAUSE_SECONDS", 0)
    other = component_of(host, model=FakeReranker(), fetch=lambda given: fetch(given))
    for _ in range(3):
        assert ranked(host, other, documents(host)) == expected
    assert n_calls == 4
    assert caplog.text.count("were not fetched") == 2


@pytest.mark.parametrize("timeout", [None, 2.0])
def test_a_store_that_hangs_is_given_up_and_asked_again_when_it_has_ended(host, timeout, caplog, monkeypatch):
    """With a time-out it gets half of the time, so that something is left to encode in."""
    monkeypatch.setattr(fetching, "PAUSE_SECONDS", 0)
    if timeout is None:
        monkeypatch.setattr(fetching, "FETCH_SECONDS", 0.05)
    store = Store(host)
    store.may_end.clear()
    component = component_of(host, model=FakeReranker(), fetch=store.fetch, timeout=timeout)
    for _ in range(3):
        assert len(host.use(component, QUERY, documents(host))) == len(TEXTS)
    assert len(store.asked) == 1
    assert caplog.text.count("the store did not answer in time") == 1
    store.may_end.set()
    monkeypatch.setattr(fetching, "FETCH_SECONDS", SECONDS)
    for thread in [thread for thread in threading.enumerate() if thread.name == "kalm-fetch"]:
        thread.join(SECONDS)
    host.use(component, QUERY, documents(host))
    assert len(store.asked) == 2


async def test_the_event_loop_goes_on_while_a_store_answers(host, make_reranker):
    reranker, store = make_reranker(), Store(host, make_reranker())
    store.may_end.clear()
    component = component_of(host, model=reranker, fetch=store.fetch)
    asking = asyncio.ensure_future(host.ause(component, QUERY, documents(host)))
    while not store.asked:
        await asyncio.sleep(0)
    store.may_end.set()
    assert scored(host, await asking) == unfetched(host, make_reranker(), documents(host))
    assert store.asked == [["id-0", "id-1", "id-2", "id-3"]]
    assert reranker.stats.passages_encoded == 0


async def test_an_async_query_does_not_wait_for_a_store_that_hangs(host, caplog, monkeypatch):
    monkeypatch.setattr(fetching, "FETCH_SECONDS", 0.05)
    store = Store(host)
    store.may_end.clear()
    component = component_of(host, model=FakeReranker(), fetch=store.fetch)
    assert len(await host.ause(component, QUERY, documents(host))) == len(TEXTS)
    assert "the store did not answer in time" in caplog.text
    store.may_end.set()


def _query(host: Host, store: Store, component, answers) -> None:
    store.may_end.set()
    answers.put((len(host.use(component, QUERY, documents(host))), len(store.asked)))


def test_a_forked_child_asks_though_its_parents_call_hangs(host, monkeypatch):
    monkeypatch.setattr(fetching, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(fetching, "FETCH_SECONDS", 0.05)
    store = Store(host)
    store.may_end.clear()
    component = component_of(host, model=FakeReranker(), fetch=store.fetch)
    host.use(component, QUERY, documents(host))
    assert len(store.asked) == 1
    monkeypatch.setattr(fetching, "FETCH_SECONDS", SECONDS)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_query, args=(host, store, component, answers))
    child.start()
    assert answers.get(timeout=SECONDS) == (len(TEXTS), 2)
    child.join(SECONDS)
    assert child.exitcode == 0
    store.may_end.set()


def test_a_store_that_hangs_does_not_keep_the_process_from_ending():
    program = """
import threading
from tools.hosts import HOSTS
from kalm_integrations.hosting import fetching
from kalm_integrations.testing import FakeReranker

fetching.FETCH_SECONDS = 0.05
for host in HOSTS:
    component = host.reranker(model=FakeReranker(), fetch=lambda given: threading.Event().wait())
    assert len(host.use(component, "query", [host.document("id", "text", {})])) == 1
print("all answered")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "all answered\n"), done.stderr


def test_a_fetch_is_part_of_the_query_for_who_traces_it(host):
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nothing")
    variable.set("the query's")
    seen = []
    fetch = lambda given: [seen.append(variable.get()) for _ in given]  # noqa: E731
    host.use(component_of(host, model=FakeReranker(), fetch=fetch), QUERY, documents(host, ["one"]))
    assert seen == ["the query's"]


def test_tracers_are_told_what_was_fetched_and_what_was_in_memory(make_reranker):
    [host] = [host for host in HOSTS if host.name == "langchain"]
    counts = []

    class Tracer(BaseCallbackHandler):
        def on_chain_end(self, outputs, **kwargs):
            counts.append(outputs)

    store = Store(host, make_reranker(), TEXTS[:3])
    rerank = component_of(host, model=make_reranker(), fetch=store.fetch)
    for _ in range(2):
        rerank.compress_documents(documents(host), QUERY, [Tracer()])
    n_returned = len(TEXTS)
    assert counts == [
        {"n_stored": 3, "n_missing": 1, "n_returned": n_returned},
        {"n_stored": 0, "n_missing": 0, "n_cached": 4, "n_returned": n_returned},
    ]


def test_only_what_the_store_did_not_have_is_written_back_and_only_once(host, make_reranker):
    store, written = Store(host, make_reranker(), TEXTS[:2]), []
    component = component_of(host, model=make_reranker(), fetch=store.fetch, write_back=lambda given: written.extend(given))
    for _ in range(3):
        host.use(component, QUERY, documents(host))
    assert wait_for_write_back(SECONDS)
    assert sorted(host.key(document) for document in written) == ["id-2", "id-3"]
    assert all("kalm_encoding" in host.metadata(document) for document in written)


def test_fetched_encodings_are_stored_ones_for_on_missing(host, make_reranker):
    store = Store(host, make_reranker())
    component = component_of(host, model=make_reranker(), fetch=store.fetch, on_missing="error")
    for _ in range(2):  # from the store, then from memory
        assert len(host.use(component, QUERY, documents(host))) == len(TEXTS)
    with pytest.raises(EncodingError, match="1 of 5 do not"):
        host.use(component, QUERY, documents(host, [*TEXTS, "a new one"]))


def fetch_nothing(given) -> list[None]:
    return [None for _ in given]


def test_a_component_keeps_copies_and_sends_its_function(host):
    component = component_of(host, model="pico", fetch=fetch_nothing)
    assert component.fetch is fetch_nothing
    assert copy.deepcopy(component).fetch is fetch_nothing
    assert pickle.loads(pickle.dumps(component)).fetch is fetch_nothing
    with pytest.raises(SettingsError, match="fetch must be a function that can be imported"):
        pickle.dumps(component_of(host, model="pico", fetch=lambda given: given))
    component.fetch = None
    assert component.fetch is None


def test_a_function_that_is_none_is_refused(host):
    with pytest.raises(SettingsError, match="fetch"):
        component_of(host, model="pico", fetch="store")


def from_langchain(given):
    store = InMemoryVectorStore(DeterministicFakeEmbedding(size=3))
    store.add_documents(given)
    return langchain.fetch_from(store)


def from_llama_index(given):
    store = SimpleDocumentStore()
    store.add_documents(given)
    return llama_index.fetch_from(store)


def from_haystack(given):
    store = InMemoryDocumentStore()
    store.write_documents(given)
    return haystack.fetch_from(store)


FROM = {"langchain": from_langchain, "llama_index": from_llama_index, "haystack": from_haystack}
MODULES = {"langchain": langchain, "llama_index": llama_index, "haystack": haystack}


def test_a_store_of_the_host_is_read_by_id(host, make_reranker):
    """Documents that it has not, or not with an encoding, get none; one that comes twice gets it twice."""
    encoded = host.ingest(make_reranker(), documents(host, TEXTS[:2]))
    fetch = FROM[host.name]([*encoded, *documents(host)[2:3]])
    expected = [host.metadata(document)["kalm_encoding"] for document in encoded]
    given = documents(host)
    assert fetch([*given, given[1]]) == [*expected, None, None, expected[1]]
    reranker = make_reranker()
    component = component_of(host, model=reranker, fetch=fetch)
    n_returned = len(host.use(component, QUERY, [*given[:2], given[1]]))
    assert n_returned == (2 if host.name == "haystack" else 3)  # Haystack ranks each id once
    assert reranker.stats.passages_encoded == 0


def test_a_store_that_is_none_is_refused(host):
    with pytest.raises(SettingsError, match="store must"):
        MODULES[host.name].fetch_from({})


def test_documents_without_an_id_are_not_asked_for_and_the_others_once():
    read = []

    class Access:
        def read(self, ids):
            read.append(list(ids))
            return {i: {"kalm_encoding": f"encoding of {i}"} for i in ids if i != "gone"}

    kind = DocumentKind(to_passage=None, metadata=lambda document: document, has_text_of=None, encoding_key="kalm_encoding")
    ids = ["a", None, "gone", "a", 7]
    assert encodings_of(Access(), kind, ids) == ["encoding of a", None, None, "encoding of a", "encoding of 7"]
    assert read == [["a", "gone", 7]]
    assert encodings_of(Access(), kind, [None]) == [None]
    assert len(read) == 1
