"""One contract for write-back under all hosts: it happens after the answer, in order, and harms no query."""

from __future__ import annotations

import contextvars
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from tools.hosts import HOSTS, Host

from kalm_integrations import haystack, hosting, langchain, llama_index
from kalm_integrations.core import write_queue
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting import wait_for_write_back, write_back_stats
from kalm_integrations.testing import FakeReranker

TEXTS = ["The Panthers defense gave up just 308 points.", "Lift and drag of a slender wing.", "naïve café 東京"]
QUERY = "who won the super bowl?"
SECONDS = 20
"""How long a test waits for what must happen, before it fails."""
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}


@pytest.fixture(params=HOSTS, ids=lambda host: host.name)
def host(request) -> Host:
    return request.param


@pytest.fixture(autouse=True)
def empty_queue():
    """Every test begins with an empty queue, and leaves one."""
    assert wait_for_write_back(SECONDS)
    yield
    assert wait_for_write_back(SECONDS)


def documents(host: Host, texts=TEXTS):
    return [host.document(f"id-{i}", text, {"page": i}) for i, text in enumerate(texts)]


class Store:
    """Takes documents, and may hang before."""

    def __init__(self, *, hangs: bool = False) -> None:
        self.began = threading.Event()
        self.may_end = threading.Event()
        if not hangs:
            self.may_end.set()
        self.written: list[list] = []

    def write(self, given) -> None:
        self.began.set()
        assert self.may_end.wait(SECONDS)
        self.written.append(list(given))


def ask(host: Host, component, texts=TEXTS) -> list[str]:
    return [host.key(document) for document in host.use(component, QUERY, documents(host, texts))]


def test_a_query_is_answered_while_its_store_still_hangs(host):
    """And so are the next ones, of the same component and of another; what they made is written in order."""
    store = Store(hangs=True)
    component = host.reranker(model=FakeReranker(), write_back=store.write)
    expected = ask(host, host.reranker(model=FakeReranker()))
    assert ask(host, component) == expected
    assert store.began.wait(SECONDS)
    for text in ("one", "two"):
        assert ask(host, component, [text]) == ["id-0"]
    assert ask(host, host.reranker(model=FakeReranker(), write_back=store.write), ["three"]) == ["id-0"]
    assert store.written == []
    assert wait_for_write_back(0) is False
    assert write_back_stats().n_waiting == 6
    store.may_end.set()
    assert wait_for_write_back(SECONDS) is True
    assert write_back_stats().n_waiting == 0
    assert [len(given) for given in store.written] == [3, 1, 1, 1]
    texts = [host.encode(host.encoder(model=FakeReranker()), documents(host, [text])) for text in ("one", "two", "three")]
    assert store.written[1:] == texts


async def test_an_async_query_is_answered_while_its_store_still_hangs(host):
    store = Store(hangs=True)
    if host.name == "langchain":
        component = langchain.KalmRerank(model=FakeReranker(), write_back=store.write)
        assert len(await component.acompress_documents(documents(host), QUERY)) == 3
    elif host.name == "llama_index":
        component = llama_index.KalmRerank(FakeReranker(), write_back=store.write)
        nodes = [host.retrieved(node, 0.5) for node in documents(host)]
        assert len(await component.apostprocess_nodes(nodes, query_str=QUERY)) == 3
    else:
        component = haystack.KalmRanker(model=FakeReranker(), write_back=store.write)
        assert len((await component.run_async(QUERY, documents(host)))["documents"]) == 3
    assert store.began.wait(SECONDS)
    assert store.written == []
    store.may_end.set()


def test_what_is_written_is_what_the_query_saw(host):
    """Documents that their owner changes after the answer do not change what is written."""
    first, store = Store(hangs=True), Store()
    ask(host, host.reranker(model=FakeReranker(), write_back=first.write))
    given = documents(host)
    expected = host.encode(host.encoder(model=FakeReranker()), documents(host))
    host.use(host.reranker(model=FakeReranker(), write_back=store.write), QUERY, given)
    for document in given:
        host.metadata(document)["page"] = "changed"
        host.metadata(document)["kalm_encoding"] = "nonsense"
    first.may_end.set()
    assert wait_for_write_back(SECONDS)
    assert store.written == [expected]


def test_a_failing_store_is_logged_and_the_next_write_goes_on(host, caplog):
    def fail(given) -> None:
        msg = "the store is gone"
        raise ConnectionError(msg)

    def leave(given) -> None:
        sys.exit("the store wants to end")

    store, before = Store(), write_back_stats()
    for write in (fail, leave, store.write):
        assert len(ask(host, host.reranker(model=FakeReranker(), write_back=write))) == len(TEXTS)
    assert wait_for_write_back(SECONDS)
    assert [len(given) for given in store.written] == [3]
    assert caplog.text.count("could not write back the encodings of 3 documents; the query is answered") == 2
    assert "the store is gone" in caplog.text
    after = write_back_stats()
    assert (after.n_done - before.n_done, after.n_failed - before.n_failed) == (3, 6)


def test_the_callers_context_stays_with_the_caller(host):
    """Callbacks and spans of a query that is over get no part of its write-back."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nothing")
    seen = []
    variable.set("the query's")
    ask(
        host,
        host.reranker(model=FakeReranker(), write_back=lambda _: seen.append((variable.get(), threading.current_thread()))),
    )
    assert wait_for_write_back(SECONDS)
    [(value, thread)] = seen
    assert value == "nothing"
    assert thread is not threading.current_thread()
    assert thread.daemon


def test_a_store_that_hangs_too_long_is_given_up_and_the_others_are_written(host, caplog, monkeypatch):
    """It gets nothing more until it has ended, so that it never sees two writes at once."""
    monkeypatch.setattr(write_queue, "TIMEOUT_SECONDS", 0.05)
    hanging, other = Store(hangs=True), Store()
    component = host.reranker(model=FakeReranker(), write_back=hanging.write)
    before = write_back_stats().n_dropped
    ask(host, component)
    assert hanging.began.wait(SECONDS)
    # Not for the others, which a busy machine may make slow.
    monkeypatch.undo()
    ask(host, host.reranker(model=FakeReranker(), write_back=other.write))
    assert wait_for_write_back(SECONDS)
    assert [len(given) for given in other.written] == [3]
    assert "writing back the encodings of 3 documents takes more than" in caplog.text
    ask(host, component)
    assert "an earlier write to the same place has not ended yet" in caplog.text
    assert write_back_stats().n_dropped == before + 6
    hanging.may_end.set()
    # The given-up write ends in its own time, after which the store is taken again.
    for _ in range(10_000):
        ask(host, component)
        assert wait_for_write_back(SECONDS)
        if len(hanging.written) > 1:
            break
    assert [len(given) for given in hanging.written] == [3, 3]


def test_no_more_wait_than_memory_bears(host, caplog, monkeypatch):
    """What comes beyond is dropped, counted and logged once; the queries are answered."""
    monkeypatch.setattr(write_queue, "MAX_WAITING_DOCUMENTS", 7)
    store, before = Store(hangs=True), write_back_stats().n_dropped
    component = host.reranker(model=FakeReranker(), write_back=store.write)
    ask(host, component)
    assert store.began.wait(SECONDS)
    for _ in range(4):
        assert len(ask(host, component)) == len(TEXTS)
    assert write_back_stats().n_dropped == before + 9
    assert caplog.text.count("more than 7 wait already") == 1
    store.may_end.set()
    assert wait_for_write_back(SECONDS)
    assert [len(given) for given in store.written] == [3, 3]


def test_a_query_with_more_than_the_bound_is_written_when_nothing_waits(host, monkeypatch):
    monkeypatch.setattr(write_queue, "MAX_WAITING_DOCUMENTS", 2)
    store = Store()
    ask(host, host.reranker(model=FakeReranker(), write_back=store.write))
    assert wait_for_write_back(SECONDS)
    assert [len(given) for given in store.written] == [3]


@pytest.mark.parametrize("timeout", ["5", -1, float("nan"), True])
def test_a_time_out_is_a_number_of_seconds(timeout):
    with pytest.raises(SettingsError, match="timeout must be a number of seconds or None"):
        wait_for_write_back(timeout)


def test_every_host_has_the_function_at_hand():
    functions = {module.wait_for_write_back for module in (hosting, langchain, llama_index, haystack)}
    assert functions == {wait_for_write_back}


def _query_and_write(host: Host, answers) -> None:
    store = Store()
    keys = ask(host, host.reranker(model=FakeReranker(), write_back=store.write))
    answers.put((keys, wait_for_write_back(SECONDS), [len(given) for given in store.written]))


def test_a_forked_child_queries_and_writes_back(host):
    """Also while its parent's store hangs; what the parent has in its queue is the parent's to write."""
    context = multiprocessing.get_context("fork")
    store, answers = Store(hangs=True), context.Queue()
    keys = ask(host, host.reranker(model=FakeReranker(), write_back=store.write))
    assert store.began.wait(SECONDS)
    child = context.Process(target=_query_and_write, args=(host, answers))
    child.start()
    assert answers.get(timeout=SECONDS) == (keys, True, [3])
    child.join(SECONDS)
    assert child.exitcode == 0
    store.may_end.set()
    assert wait_for_write_back(SECONDS)
    assert [len(given) for given in store.written] == [3]


PROGRAM = """
import threading, time
from tools.hosts import HOSTS
from kalm_integrations.core import write_queue
from kalm_integrations.hosting import wait_for_write_back
from kalm_integrations.testing import FakeReranker

def ask(host, write):
    given = [host.document(f"id-{i}", text, {}) for i, text in enumerate(["one", "two"])]
    assert len(host.use(host.reranker(model=FakeReranker(), write_back=write), "query", given)) == 2
"""


def run_program(code: str) -> subprocess.CompletedProcess:
    program = [sys.executable, "-c", PROGRAM + textwrap.dedent(code)]
    return subprocess.run(program, capture_output=True, text=True, timeout=300, check=False, env=ENVIRONMENT)


def test_what_waits_is_written_before_the_process_ends():
    """A script need not wait itself. Without write-back there is no thread."""
    done = run_program("""
        for host in HOSTS:
            ask(host, None)
        assert wait_for_write_back()
        assert not [thread for thread in threading.enumerate() if thread.name == "kalm-write-back"]
        for host in HOSTS:
            ask(host, lambda given: (time.sleep(0.05), print("written", len(given), flush=True)))
        """)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["written 2"] * len(HOSTS)


def test_a_store_that_hangs_does_not_keep_the_process_from_ending():
    done = run_program("""
        write_queue.EXIT_SECONDS = 0.1
        for host in HOSTS:
            ask(host, lambda given: threading.Event().wait())
        print("all answered")
        """)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["all answered", ""]
    assert "the process ends before the encodings of 6 documents are written back" in done.stderr


def test_a_store_of_haystack_that_hangs_holds_up_no_query_and_no_other_store(monkeypatch):
    from haystack import Document
    from haystack.document_stores.in_memory import InMemoryDocumentStore

    monkeypatch.setattr(write_queue, "TIMEOUT_SECONDS", 0.05)
    began, may_end = threading.Event(), threading.Event()

    class Hanging(InMemoryDocumentStore):
        def update_by_filter(self, filters, meta):
            began.set()
            assert may_end.wait(SECONDS)
            return super().update_by_filter(filters, meta)

    stores = [Hanging(), InMemoryDocumentStore()]
    for store in stores:
        store.write_documents([Document(id="one", content="text")])
        ranker = haystack.KalmRanker(model=FakeReranker(), document_store=store)
        assert len(ranker.run(QUERY, store.filter_documents())["documents"]) == 1
        assert began.wait(SECONDS)
        monkeypatch.undo()  # only the first is timed
    assert wait_for_write_back(SECONDS)
    assert ["kalm_fp" in store.filter_documents()[0].meta for store in stores] == [False, True]
    # Backfill of the other store, too, waits for nobody.
    stores[1].write_documents([Document(id="two", content="more text")])
    encoder = haystack.KalmDocumentEncoder(model=FakeReranker(), progress_bar=False)
    assert haystack.backfill(stores[1], encoder, progress_bar=False).n_missing == 1
    may_end.set()
