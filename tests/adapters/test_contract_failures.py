"""One contract for what all adapters do when reranking is late or fails, and for their coroutines."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest
import torch
from tools.holding import Held
from tools.hosts import HOSTS, Host

from kalm_integrations import KalmReranker
from kalm_integrations.core import fallback, passes
from kalm_integrations.errors import (
    CheckpointNotFoundError,
    DeadlineExceededError,
    EncodingError,
    OutOfMemoryError,
    SettingsError,
)
from kalm_integrations.testing import FakeReranker

TEXTS = ["Lyon lies on the Rhone.", "The Panthers defense gave up just 308 points.", "Super Bowl 50 was played in 2015.", "a"]
QUERY = "who won the super bowl?"


@pytest.fixture(params=HOSTS, ids=lambda host: host.name)
def host(request) -> Host:
    return request.param


@pytest.fixture(params=["thread", "coroutine"])
def use(request, host):
    """Reranks in one of two ways."""

    async def call(component, documents):
        if request.param == "coroutine":
            return await host.ause(component, QUERY, documents)
        return await asyncio.to_thread(host.use, component, QUERY, documents)

    return call


@pytest.fixture(autouse=True)
def nothing_failed_before():
    fallback.note_answer()


def documents(host: Host, **metadata):
    return [host.document(f"id-{i}", text, {"page": i, **metadata}) for i, text in enumerate(TEXTS)]


def check_kept(host: Host, returned, n: int) -> None:
    """The first documents as they came, marked, without a score of ours and without encodings."""
    assert [host.key(document) for document in returned] == [f"id-{i}" for i in range(n)]
    assert [host.metadata(document) for document in returned] == [{"page": i, "reranked": False} for i in range(n)]
    # LangChain has no field for a score.
    scores = [
        document.metadata.get("relevance_score") if host.name == "langchain" else host.score(document) for document in returned
    ]
    assert scores == [0.5 if host.name == "llama_index" else None] * n


async def test_a_late_answer_is_an_error_or_keeps_the_order(host, use, make_reranker):
    reranker = make_reranker()
    with Held(reranker):
        with pytest.raises(DeadlineExceededError, match=r"within timeout=0\.05 seconds"):
            await use(host.reranker(model=reranker, timeout=0.05), documents(host))
        component = host.reranker(model=reranker, timeout=0.05, on_error="keep_order", **{host.top: 3})
        check_kept(host, await use(component, documents(host)), 3)
        assert reranker.runtime.engine.n_queued == 1
    component.timeout = None
    returned = await use(component, documents(host))
    assert all("reranked" not in host.metadata(document) for document in returned)
    assert [host.key(d) for d in returned] == [f"id-{p.index}" for p in reranker.rank(QUERY, TEXTS, top_k=3)]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error")], ids=["memory", "torch"]
)
async def test_a_failure_of_the_model_keeps_the_order_and_is_logged_once(host, use, make_reranker, monkeypatch, caplog, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(passes, "encode", fail)
    reranker = make_reranker()
    component = host.reranker(model=reranker, on_error="keep_order")
    with caplog.at_level(logging.WARNING, logger=fallback.__name__):
        for _ in range(3):
            check_kept(host, await use(component, documents(host)), len(TEXTS) if host.name != "langchain" else 3)
    assert sum(record.name == fallback.__name__ for record in caplog.records) == 1
    with pytest.raises(OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else RuntimeError, match="CUDA"):
        await use(host.reranker(model=reranker), documents(host))


async def test_a_checkpoint_that_is_not_there_keeps_the_order(host, use, tmp_path):
    missing = str(tmp_path / "gone")
    check_kept(host, await use(host.reranker(model=missing, on_error="keep_order", **{host.top: 2}), documents(host)), 2)
    with pytest.raises(CheckpointNotFoundError):
        await use(host.reranker(model=missing), documents(host))


async def test_encodings_are_stripped_and_nothing_is_written_back_all_the_same(host, use, make_reranker):
    """What is kept goes on into prompts and traces like what is reranked."""
    reranker, written = make_reranker(), []
    stored = host.ingest(reranker, documents(host))
    other = make_reranker(compression_ratio=8)
    with Held(other):
        component = host.reranker(model=other, timeout=0.05, on_error="keep_order", write_back=written.append, **{host.top: 4})
        check_kept(host, await use(component, stored), 4)
        plain = host.reranker(model=other, timeout=0.05, on_error="keep_order", strip_encodings=False)
        assert all("kalm_encoding" in host.metadata(document) for document in await use(plain, stored))
    assert written == []


async def test_mistakes_are_raised_all_the_same(host, use, make_reranker):
    component = host.reranker(model=make_reranker(), on_error="keep_order", on_missing="error")
    with pytest.raises(EncodingError, match="on_missing='error'"):
        await use(component, documents(host))


async def test_a_mark_of_an_earlier_failure_goes_when_it_works(host, use, make_reranker):
    returned = await use(host.reranker(model=make_reranker()), documents(host, reranked=False))
    assert returned
    assert all("reranked" not in host.metadata(document) for document in returned)
    # Somebody else's metadata stays.
    returned = await use(host.reranker(model=make_reranker()), documents(host, reranked="by hand"))
    assert all(host.metadata(document)["reranked"] == "by hand" for document in returned)


@pytest.mark.parametrize(
    "settings", [{"timeout": 0}, {"timeout": "1 s"}, {"on_error": "ignore"}, {"on_error": None}], ids=repr
)
def test_bad_settings_are_refused_when_a_component_is_made(host, settings):
    with pytest.raises(SettingsError, match=next(iter(settings))):
        host.reranker(model=FakeReranker(), **settings)


def test_settings_are_shown_and_travel(host, tiny_checkpoint):
    made = host.reranker(model=str(tiny_checkpoint), timeout=2.5, on_error="keep_order")
    dumped = host.dump(made)
    settings = dumped.get("init_parameters", dumped)
    assert (settings["timeout"], settings["on_error"]) == (2.5, "keep_order")


# --- coroutines


async def test_two_hundred_coroutines_wait_without_a_thread(host, make_reranker):
    reranker = make_reranker()
    component = host.reranker(model=reranker)
    right = await host.ause(component, QUERY, documents(host))
    before = threading.active_count()
    with Held(reranker):
        tasks = [asyncio.create_task(host.ause(component, QUERY, documents(host))) for _ in range(200)]
        while reranker.runtime.engine.n_queued < 801:
            await asyncio.sleep(0.01)
        assert threading.active_count() <= before + 4
        assert await asyncio.to_thread(lambda: "free") == "free"
    for returned in await asyncio.gather(*tasks):
        assert [host.key(document) for document in returned] == [host.key(document) for document in right]


async def test_a_cancelled_coroutine_takes_its_request_back(host, make_reranker):
    reranker = make_reranker()
    with Held(reranker):
        task = asyncio.create_task(host.ause(host.reranker(model=reranker), QUERY, documents(host)))
        while reranker.runtime.engine.n_queued < 5:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert reranker.runtime.engine.n_queued == 1
    assert reranker.stats.passages_encoded == 0


async def test_encoders_wait_without_a_thread_and_can_be_cancelled(host, make_reranker):
    reranker = make_reranker()
    encoder = host.encoder(model=reranker)
    with Held(reranker):
        task = asyncio.create_task(host.aencode(encoder, documents(host)))
        while reranker.runtime.engine.n_queued < 5:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert reranker.stats.passages_encoded == 0
    encoded = await host.aencode(encoder, documents(host))
    assert [host.metadata(d) for d in encoded] == [host.metadata(d) for d in host.encode(encoder, documents(host))]
    assert await host.aencode(encoder, []) == []


async def test_the_event_loop_goes_on_while_a_model_is_opened(host, tiny_checkpoint, monkeypatch):
    """The first query of a service opens the checkpoint, which takes seconds for a large one."""
    loop_went_on = asyncio.Event()
    loop = asyncio.get_running_loop()
    opening = KalmReranker.from_pretrained.__func__

    def slow(cls, *arguments, **settings):
        loop.call_soon_threadsafe(loop_went_on.set)
        done = asyncio.run_coroutine_threadsafe(loop_went_on.wait(), loop)
        assert done.result(60)  # would never come if the loop were blocked
        return opening(cls, *arguments, **settings)

    monkeypatch.setattr(KalmReranker, "from_pretrained", classmethod(slow))
    assert await host.ause(host.reranker(model=str(tiny_checkpoint)), QUERY, documents(host))
