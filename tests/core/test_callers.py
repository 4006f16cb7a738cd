"""Many callers of one model: coroutines, time-outs, failures that keep the order, forks, and states of torch around a call."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from tools.holding import Held

from kalm_integrations import KalmReranker, Passage
from kalm_integrations.core import fallback, passes
from kalm_integrations.core.reading import Reader
from kalm_integrations.errors import (
    DeadlineExceededError,
    KalmError,
    PassError,
    QueueFullError,
    SettingsError,
    StaleEncodingError,
)
from kalm_integrations.testing import FakeReranker

QUERY = "who won the Super Bowl?"
TEXTS = [f"Passage number {i} " + "about the Panthers defense " * (i % 4) for i in range(12)]


@pytest.fixture
def reranker(make_reranker) -> KalmReranker:
    return make_reranker(cache_bytes=0)


@pytest.fixture
def held(reranker) -> Iterator[Held]:
    with Held(reranker) as found:
        yield found


@pytest.fixture(autouse=True)
def nothing_failed_before():
    fallback.note_answer()


# --- coroutines


async def test_coroutines_get_what_threads_get(reranker):
    assert list(await reranker.arank(QUERY, TEXTS, top_k=3)) == list(reranker.rank(QUERY, TEXTS, top_k=3))
    assert await reranker.ascore(QUERY, TEXTS) == reranker.score(QUERY, TEXTS)
    made = await reranker.aencode_passages(TEXTS)
    right = reranker.encode_passages(TEXTS)
    assert all(torch.equal(one.states, other.states) for one, other in zip(made, right, strict=True))
    assert await reranker.aencode_to_metadata(TEXTS[:2]) == reranker.encode_to_metadata(TEXTS[:2])
    assert (await reranker.aread(TEXTS[:2])).statuses == ("missing", "missing")


async def test_many_coroutines_wait_without_a_thread(reranker, held):
    """Two hundred requests queue, and asyncio's own threads are all free."""
    passages = [Passage(text) for text in TEXTS[:2]]
    before = threading.active_count()
    tasks = [asyncio.create_task(reranker.ascore(f"{QUERY} {i}", passages)) for i in range(200)]
    while reranker.runtime.engine.n_queued < 401:
        await asyncio.sleep(0.01)
    assert threading.active_count() <= before + 4
    assert await asyncio.to_thread(lambda: "free") == "free"
    held.release()
    scores = await asyncio.gather(*tasks)
    assert scores[7] == pytest.approx(reranker.score(f"{QUERY} 7", passages), abs=1e-6)


async def test_requests_of_many_callers_share_batches(make_reranker, monkeypatch):
    reranker, other = make_reranker(), make_reranker()
    right = [reranker.score(f"{QUERY} {i}", TEXTS[i : i + 3]) for i in range(8)]
    other.encode_passages(TEXTS)
    sizes: list[int] = []
    answer_logits = passes.answer_logits

    def count(cache, *args):
        logits = answer_logits(cache, *args)
        sizes.append(len(logits))
        return logits

    monkeypatch.setattr(passes, "answer_logits", count)
    held = Held(reranker)
    asked = [(reranker, other)[i % 2].ascore(f"{QUERY} {i}", TEXTS[i : i + 3]) for i in range(8)]
    tasks = [asyncio.create_task(one) for one in asked]
    while reranker.runtime.engine.n_queued < 25:
        await asyncio.sleep(0.01)
    held.release()
    for got, expected in zip(await asyncio.gather(*tasks), right, strict=True):
        assert got == pytest.approx(expected, abs=1e-6)
    assert sizes == [24]


async def test_heavy_requests_and_stores_are_read_off_the_model_s_thread(make_reranker, monkeypatch):
    """What takes long between jobs must hold up nobody else; what is light is done by the model's thread under load."""
    readers: list[str] = []
    read = Reader.read

    def note(self, passages):
        readers.append(threading.current_thread().name)
        return read(self, passages)

    monkeypatch.setattr(Reader, "read", note)
    light, heavy, stored = make_reranker(), make_reranker(), make_reranker(prefix_store={})
    with Held(light):
        asked = [light.ascore(QUERY, TEXTS), heavy.ascore(QUERY, [*TEXTS, "x" * 2**21]), stored.ascore(QUERY, TEXTS)]
        tasks = [asyncio.create_task(one) for one in asked]
        thread = asyncio.create_task(asyncio.to_thread(light.score, QUERY, TEXTS))
        while light.runtime.engine.n_queued < 26:
            await asyncio.sleep(0.01)
    await asyncio.gather(*tasks, thread)
    assert sorted(name.partition("_")[0] for name in readers) == ["kalm-callers", "kalm-callers", "kalm-engine", "kalm-engine"]


async def test_a_cancelled_coroutine_takes_its_request_back(reranker, held):
    task = asyncio.create_task(reranker.arank(QUERY, TEXTS))
    while reranker.runtime.engine.n_queued < len(TEXTS):
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert reranker.runtime.engine.n_queued == 1
    held.release()
    assert reranker.stats.passages_encoded == 0
    assert len(await reranker.ascore(QUERY, TEXTS)) == len(TEXTS)


async def test_of_a_cancelled_ingest_the_rest_is_not_encoded(make_reranker):
    reranker = make_reranker(encode_batch_size=1)
    task = asyncio.create_task(reranker.aencode_passages([f"{text} {i}" for i in range(50) for text in TEXTS]))
    while not reranker._ranker.reader.cache.nbytes:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert reranker.score(QUERY, TEXTS[:1])  # behind the batch that was under way
    assert len(reranker._ranker.reader.cache) < 600


async def test_a_query_passes_an_ingest(make_reranker):
    reranker = make_reranker(encode_batch_size=1)
    stored = [
        Passage(text, made["kalm_encoding"]) for text, made in zip(TEXTS, reranker.encode_to_metadata(TEXTS), strict=True)
    ]
    ingest = asyncio.create_task(reranker.aencode_passages([f"{text} {i}" for i in range(20) for text in TEXTS]))
    while len(reranker._ranker.reader.cache) == len(TEXTS):
        await asyncio.sleep(0.001)
    await reranker.ascore(QUERY, stored)
    assert not ingest.done()
    ingest.cancel()


# --- time-outs and failures


@pytest.mark.parametrize("timeout", [0, -1.0, math.nan, math.inf, "2", True, [], 10**400], ids=repr)
def test_a_time_out_is_a_positive_number(reranker, timeout):
    with pytest.raises(SettingsError, match="timeout must be a positive number of seconds"):
        reranker.rank(QUERY, TEXTS, timeout=timeout)


@pytest.mark.parametrize("on_error", ["ignore", None, 3])
def test_on_error_is_one_of_two(reranker, on_error):
    with pytest.raises(SettingsError, match="on_error must be one of raise, keep_order"):
        reranker.rank(QUERY, TEXTS, on_error=on_error)


def test_an_answer_that_is_late_is_an_error(reranker, held):
    with pytest.raises(DeadlineExceededError, match=r"within timeout=0.05 seconds, .* on_error='keep_order'") as caught:
        reranker.rank(QUERY, TEXTS, timeout=0.05)
    assert isinstance(caught.value, TimeoutError)
    assert reranker.runtime.engine.n_queued == 1  # it has left the queue


async def test_an_answer_that_is_late_is_an_error_for_coroutines_too(reranker, held):
    with pytest.raises(DeadlineExceededError, match=r"within timeout=0\.05 seconds"):
        await reranker.arank(QUERY, TEXTS, timeout=0.05)
    assert reranker.runtime.engine.n_queued == 1


async def test_in_time_nothing_is_different(reranker):
    right = list(reranker.rank(QUERY, TEXTS))
    assert list(reranker.rank(QUERY, TEXTS, timeout=60, on_error="keep_order")) == right
    ranking = await reranker.arank(QUERY, TEXTS, timeout=60, on_error="keep_order")
    assert list(ranking) == right
    assert ranking.reranked is True


def kept(ranking, n: int) -> None:
    """The first passages as they came, unscored and marked."""
    assert ranking.reranked is False
    assert [(passage.index, passage.text) for passage in ranking] == list(enumerate(TEXTS[:n]))
    assert all(math.isnan(passage.score) and math.isnan(passage.margin) for passage in ranking)
    assert ranking.made == {}
    assert ranking.to_dict()["reranked"] is False
    assert {passage["score"] for passage in ranking.to_dict()["results"]} == {None}
    assert pickle.loads(pickle.dumps(ranking)).reranked is False


async def test_a_late_answer_can_keep_the_order(reranker, held):
    kept(reranker.rank(QUERY, TEXTS, top_k=4, timeout=0.05, on_error="keep_order"), 4)
    kept(await reranker.arank(QUERY, (Passage(text) for text in TEXTS), timeout=0.05, on_error="keep_order"), 12)
    kept(reranker.rank(QUERY, reranker.read(TEXTS), top_k=3, timeout=0.05, on_error="keep_order"), 3)


FAILURES = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: illegal access"),
    OSError("gone"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
async def test_a_failure_can_keep_the_order_and_is_logged_once(reranker, monkeypatch, caplog, error):
    def fail(*_):
        raise error

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger=fallback.__name__):
        patch.setattr(passes, "encode", fail)
        for _ in range(3):
            kept(reranker.rank(QUERY, TEXTS, on_error="keep_order"), 12)
        kept(await reranker.arank(QUERY, TEXTS, on_error="keep_order"), 12)
        with pytest.raises(KalmError, match=str(error)):
            reranker.rank(QUERY, TEXTS)
    [logged] = [record.message for record in caplog.records if record.name == fallback.__name__]
    assert "the first stage's order is kept" in logged
    assert str(error) in logged
    # It works again, and the next failure is news.
    assert reranker.rank(QUERY, TEXTS, on_error="keep_order").reranked
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger=fallback.__name__):
        patch.setattr(passes, "encode", fail)
        reranker.rank(QUERY, TEXTS, on_error="keep_order")
    assert len([record for record in caplog.records if record.name == fallback.__name__]) == 2


def test_mistakes_of_the_caller_are_raised_all_the_same(reranker, other_checkpoint):
    foreign = KalmReranker.from_pretrained(other_checkpoint).encode_passages(["a"])
    with pytest.raises(SettingsError, match="top_k"):
        reranker.rank(QUERY, TEXTS, top_k=0, on_error="keep_order")
    with pytest.raises(StaleEncodingError):
        reranker.rank(QUERY, foreign, on_error="keep_order")


async def test_the_queue_is_bounded(make_reranker):
    reranker = make_reranker(max_queued_pairs=20)
    right = reranker.score(QUERY, TEXTS)
    held = Held(reranker)
    waiting = asyncio.create_task(reranker.ascore(QUERY, TEXTS))
    while reranker.runtime.engine.n_queued < 13:
        await asyncio.sleep(0.01)
    with pytest.raises(QueueFullError, match="max_queued_pairs=20"):
        await reranker.ascore(QUERY, TEXTS)
    kept(reranker.rank(QUERY, TEXTS, on_error="keep_order"), 12)
    held.release()
    assert await waiting == right
    assert await reranker.ascore(QUERY, TEXTS) == right


async def test_fakes_are_asked_in_the_same_way():
    fake = FakeReranker()
    assert list(await fake.arank("otters", ["rhine", "otters"])) == list(fake.rank("otters", ["rhine", "otters"]))
    assert await fake.ascore("otters", ["otters"]) == fake.score("otters", ["otters"])
    assert fake.rank("otters", ["a"], timeout=1, on_error="keep_order").reranked


class HangingStore(dict):
    """Answers nobody until a test says so."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.may_answer = threading.Event()

    def get(self, key: str, default: object = None) -> object:
        self.asked.set()
        self.may_answer.wait()
        return super().get(key, default)


@pytest.mark.parametrize("kind", ["prefix_store", "payload_store"])
def test_a_store_that_hangs_holds_up_its_own_callers_only(make_reranker, kind):
    """The model's thread waits for no store."""
    right = make_reranker().score(QUERY, TEXTS)
    store = HangingStore()
    writer = make_reranker(storage_mode="reference", payload_store={})
    stored = [
        Passage(*pair) for pair in zip(TEXTS, (m["kalm_encoding"] for m in writer.encode_to_metadata(TEXTS)), strict=True)
    ]
    hanging = make_reranker(**{kind: store})
    answers: list[list[float]] = []
    thread = threading.Thread(target=lambda: answers.append(hanging.score(QUERY, stored)))
    thread.start()
    assert store.asked.wait(60)
    assert make_reranker().score(QUERY, TEXTS) == pytest.approx(right, abs=1e-6)
    assert answers == []
    store.may_answer.set()
    thread.join(60)
    assert answers[0] == pytest.approx(right, abs=1e-3)


# --- the state of torch around a call


def ambient_states() -> dict:
    return {
        "autocast to bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "autocast to float16": lambda: torch.autocast("cpu", dtype=torch.float16),
        "inference mode": torch.inference_mode,
        "no grad": torch.no_grad,
        "default device": lambda: torch.device("meta"),
    }


@pytest.mark.parametrize("storage_codec", ["fp16", "int8", "rot4", "rot3"])
@pytest.mark.parametrize("name", ambient_states())
def test_ambient_states_of_torch_change_nothing(make_reranker, name, storage_codec):
    def everything() -> tuple:
        reranker = make_reranker(storage_codec=storage_codec)
        cold = reranker.score(QUERY, TEXTS)
        stored = [made["kalm_encoding"] for made in reranker.encode_to_metadata(TEXTS)]
        fresh = make_reranker(compression_ratio=8)
        made = make_reranker(storage_codec=storage_codec).rank(QUERY, TEXTS).made
        warm = fresh.score(QUERY, [Passage(*pair) for pair in zip(TEXTS, stored, strict=True)])
        return cold, stored, warm, [made[i]["kalm_encoding"] for i in range(len(TEXTS))]

    right = everything()
    with ambient_states()[name]():
        assert everything() == right
    assert everything() == right


PROGRAM = """
import torch
from kalm_integrations import KalmReranker, Passage
texts = {texts!r}
{before}
reranker = KalmReranker.from_pretrained({folder!r}, storage_codec="int8")
stored = [made["kalm_encoding"] for made in reranker.encode_to_metadata(texts)]
fresh = KalmReranker.from_pretrained({folder!r})
print(stored, reranker.score("who won?", texts), fresh.score("who won?", [Passage(*pair) for pair in zip(texts, stored)]))
"""


@pytest.mark.parametrize(
    "before",
    [
        "torch.set_default_dtype(torch.float64)",
        "torch.set_default_dtype(torch.bfloat16)",
        "torch.set_default_device('meta')",
        "torch.use_deterministic_algorithms(True); torch.utils.deterministic.fill_uninitialized_memory = True",
        "torch.set_grad_enabled(False)",
    ],
)
def test_what_is_set_for_a_whole_process_changes_nothing(tiny_checkpoint, before):
    def run(line: str) -> str:
        program = PROGRAM.format(texts=TEXTS[:3], folder=str(tiny_checkpoint), before=line)
        return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert run(before) == run("")


# --- forks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows cannot fork")
def test_children_forked_while_threads_score_and_encode_answer(make_reranker):
    reranker = make_reranker()
    right = reranker.score(QUERY, TEXTS)
    stop = threading.Event()

    def work(number: int) -> None:
        count = 0
        while not stop.is_set():
            count += 1
            reranker.score(f"{QUERY} {number} {count}", [*TEXTS, f"{number} {count}"])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        children = []
        for _ in range(8):
            time.sleep(0.03)
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    same = all(
                        math.isclose(a, b, abs_tol=1e-6) for a, b in zip(reranker.score(QUERY, TEXTS), right, strict=True)
                    )
                    new = len(reranker.score(QUERY, ["a text of the child's own"]))
                    status = 0 if same and new else 2
                finally:
                    os._exit(status)
            children.append(child)
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 8
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert reranker.score(QUERY, TEXTS) == right


def test_errors_of_torch_are_ours_for_threads(reranker, monkeypatch):
    def fail(*_):
        msg = "no kernel image is available"
        raise RuntimeError(msg)

    monkeypatch.setattr(passes, "encode", fail)
    with pytest.raises(PassError, match="no kernel image"):
        reranker.encode_passages(TEXTS)
