"""The engine: what is worked off when, together with what, and what becomes of it when its caller is gone. Without a model."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError

import pytest
import torch

from kalm_integrations.core import queueing
from kalm_integrations.core.engine import Engine
from kalm_integrations.core.flows import Driver
from kalm_integrations.core.jobs import Job, Work
from kalm_integrations.errors import EngineError, OutOfMemoryError, PassError, QueueFullError


class Recorder:
    """Work that remembers its batches, and waits at a gate until a test has queued what it wants to."""

    def __init__(self, size: int = 4, **work) -> None:
        self.batches: list[list] = []
        self.gate = threading.Event()
        self.started = threading.Event()
        self.work = Work(self.run, size, **work)

    def run(self, items: list) -> list:
        self.started.set()
        self.gate.wait()
        self.batches.append(list(items))
        return [f"{item}!" for item in items]


@pytest.fixture
def engine() -> Engine:
    return Engine()


def hold(engine: Engine, recorder: Recorder) -> Job:
    """Keep the worker busy with an item of its own, until the gate opens."""
    job = Job(Work(recorder.run, 1), ["held"])
    engine.submit(job)
    assert recorder.started.wait(10)
    return job


def submit(engine: Engine, recorder: Recorder, items: list, **settings) -> Job:
    job = Job(recorder.work, items, **settings)
    engine.submit(job)
    return job


def test_results_come_in_order_in_batches(engine):
    recorder = Recorder()
    recorder.gate.set()
    assert submit(engine, recorder, list("abcdefghij")).result(10) == [f"{c}!" for c in "abcdefghij"]
    assert recorder.batches == [list("abcd"), list("efgh"), list("ij")]


def test_nothing_to_do_is_done_at_once_and_starts_no_thread(engine):
    before = threading.active_count()
    assert submit(engine, Recorder(), []).result(0) == []
    assert threading.active_count() == before


def test_small_requests_share_a_batch_and_only_whole(engine):
    recorder = Recorder(group="pairs")
    hold(engine, recorder)
    jobs = [submit(engine, recorder, items) for items in (["a1", "a2"], ["b1", "b2", "b3"], ["c1"], ["d1"])]
    recorder.gate.set()
    assert [job.result(10) for job in jobs] == [["a1!", "a2!"], ["b1!", "b2!", "b3!"], ["c1!"], ["d1!"]]
    # Equal ones in order; b does not fit beside a, c and d do.
    assert recorder.batches[1:] == [["c1", "d1", "a1", "a2"], ["b1", "b2", "b3"]]


def test_other_groups_and_ungrouped_work_share_nothing(engine):
    recorder, other, alone = Recorder(group="pairs"), Recorder(group="texts"), Recorder()
    held = hold(engine, recorder)
    jobs = [submit(engine, one, [name]) for one, name in ((recorder, "a"), (other, "b"), (alone, "c"), (alone, "d"))]
    for one in (recorder, other, alone):
        one.gate.set()
    assert [job.result(10) for job in [held, *jobs]] == [["held!"], ["a!"], ["b!"], ["c!"], ["d!"]]
    assert (recorder.batches[1:], other.batches, alone.batches) == ([["a"]], [["b"]], [["c"], ["d"]])


def test_a_batch_is_bounded_by_its_tokens(engine):
    recorder = Recorder(size=8, group="texts", length=len, max_tokens=12)
    hold(engine, recorder)
    jobs = [submit(engine, recorder, items) for items in (["x" * 20, "aaaa", "bbb", "cc", "d"], ["e", "f"])]
    recorder.gate.set()
    assert [len(job.result(10)) for job in jobs] == [5, 2]
    # The longest counts for all, as padding does; what is too long is alone.
    assert recorder.batches[1:] == [["e", "f"], ["x" * 20], ["aaaa", "bbb", "cc"], ["d"]]


def test_queries_pass_bulk_work_between_two_batches(engine):
    recorder = Recorder()
    hold(engine, recorder)
    bulk = submit(engine, recorder, [f"bulk {i}" for i in range(12)], is_bulk=True)
    query = submit(engine, recorder, ["query"])
    recorder.gate.set()
    assert query.result(10) == ["query!"]
    assert len(bulk.result(10)) == 12
    assert recorder.batches[1] == ["query"]


def test_a_query_that_comes_during_bulk_work_waits_for_one_batch(engine):
    recorder = Recorder()
    bulk = submit(engine, recorder, [f"bulk {i}" for i in range(12)], is_bulk=True)
    assert recorder.started.wait(10)
    query = submit(engine, recorder, ["query"])
    recorder.gate.set()
    bulk.result(10)
    query.result(10)
    assert recorder.batches[1] == ["query"]


def test_bulk_work_is_not_starved(engine, monkeypatch):
    monkeypatch.setattr(queueing, "BULK_PATIENCE", -1.0)
    recorder = Recorder()
    hold(engine, recorder)
    queries = [submit(engine, recorder, [f"query {i}" for i in range(8)]) for _ in range(3)]
    submit(engine, recorder, ["bulk"], is_bulk=True)
    recorder.gate.set()
    for query in queries:
        query.result(10)
    assert recorder.batches[1] == ["bulk"]


def test_a_small_request_passes_a_large_one_and_the_large_one_is_not_starved(engine):
    recorder = Recorder(size=2)
    hold(engine, recorder)
    large = submit(engine, recorder, [f"large {i}" for i in range(10)])
    small = [submit(engine, recorder, [f"small {i}", f"small {i}"]) for i in range(8)]
    recorder.gate.set()
    large.result(10)
    assert recorder.batches[1] == ["small 0"] * 2
    for job in small:
        job.result(10)
    # Those that come later are behind it once as much work as its own was done.
    assert all(job.tag < large.tag for job in small)
    late = submit(engine, recorder, ["late"])
    assert late.tag > large.tag


def test_equal_requests_are_served_in_order(engine):
    recorder = Recorder(size=2)
    hold(engine, recorder)
    jobs = [submit(engine, recorder, [f"{i}a", f"{i}b"]) for i in range(20)]
    recorder.gate.set()
    for job in jobs:
        job.result(10)
    assert recorder.batches[1:] == [[f"{i}a", f"{i}b"] for i in range(20)]


# --- what is taken back


def test_a_cancelled_request_leaves_the_queue(engine):
    recorder = Recorder()
    hold(engine, recorder)
    gone, kept = submit(engine, recorder, list("abcdef")), submit(engine, recorder, ["kept"])
    assert engine.n_queued == 8
    assert gone.cancel()
    assert engine.n_queued == 2
    recorder.gate.set()
    assert kept.result(10) == ["kept!"]
    assert recorder.batches == [["held"], ["kept"]]
    with pytest.raises(CancelledError):
        gone.result(0)


def test_of_a_request_that_is_under_way_the_rest_is_not_computed(engine):
    recorder = Recorder()
    gone = submit(engine, recorder, list("abcdefgh"))
    assert recorder.started.wait(10)
    assert gone.cancel()
    kept = submit(engine, recorder, ["kept"])
    recorder.gate.set()
    assert kept.result(10) == ["kept!"]
    assert recorder.batches == [list("abcd"), ["kept"]]
    assert engine.n_queued == 0


def test_what_is_beyond_the_bound_is_refused_and_named(engine):
    recorder = Recorder()
    held = hold(engine, recorder)
    waiting = Job(recorder.work, list("abc"))
    engine.submit(waiting, max_queued=4)
    with pytest.raises(QueueFullError, match=r"max_queued_pairs=4 may wait .* 4 wait and 2 more .* try again later"):
        engine.submit(Job(recorder.work, list("de")), max_queued=4)
    # Ingest has a bound of its own: it keeps no query out.
    bulk = Job(recorder.work, list("fg"), is_bulk=True)
    engine.submit(bulk, max_queued=4)
    recorder.gate.set()
    assert [len(job.result(10)) for job in (held, waiting, bulk)] == [1, 3, 2]
    alone = Job(recorder.work, list("hijklm"))
    while engine.n_queued:
        time.sleep(0.001)
    engine.submit(alone, max_queued=4)
    assert len(alone.result(10)) == 6


# --- what fails


def failing(bad: str, error: BaseException, batches: list):
    def run(items: list[str]) -> list[str]:
        batches.append(list(items))
        if bad in items:
            raise error
        return items

    return run


def test_one_request_s_failure_is_not_the_others(engine):
    batches: list = []
    recorder = Recorder()
    hold(engine, recorder)
    work = Work(failing("bad", RuntimeError("shapes"), batches), 8, "pairs")
    jobs = [Job(work, items) for items in (["a"], ["bad"], ["c"])]
    for job in jobs:
        engine.submit(job)
    recorder.gate.set()
    assert (jobs[0].result(10), jobs[2].result(10)) == (["a"], ["c"])
    with pytest.raises(PassError, match="torch failed with shapes"):
        jobs[1].result(10)
    assert batches == [["a", "bad", "c"], ["a"], ["bad"], ["c"]]
    assert engine.n_queued == 0


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")], ids=["host", "device"])
def test_memory_that_runs_out_halves_the_batch_of_all_that_share_it(engine, error):
    batches: list[list[str]] = []

    def run(items: list[str]) -> list[str]:
        batches.append(list(items))
        if len(items) > 3:
            raise error
        return items

    recorder = Recorder()
    hold(engine, recorder)
    work = Work(run, 8, "pairs")
    jobs = [Job(work, items) for items in (list("abcd"), list("efg"))]
    for job in jobs:
        engine.submit(job)
    recorder.gate.set()
    assert [job.result(10) for job in jobs] == [list("abcd"), list("efg")]
    assert [len(batch) for batch in batches] == [7, 3, 3, 1]


def test_memory_for_less_than_one_item_is_an_error_of_ours(engine):
    job = Job(Work(failing("a", MemoryError("no more"), []), 4), ["a"])
    engine.submit(job)
    with pytest.raises(OutOfMemoryError, match="no more") as caught:
        job.result(10)
    assert isinstance(caught.value.__cause__, MemoryError)


def test_errors_of_the_interpreter_reach_the_caller_and_the_engine_goes_on(engine):
    job = Job(Work(failing("a", SystemExit(3), []), 4), ["a"])
    engine.submit(job)
    with pytest.raises(SystemExit):
        job.result(10)
    recorder = Recorder()
    recorder.gate.set()
    assert submit(engine, recorder, ["b"]).result(10) == ["b!"]


def test_the_engine_s_own_thread_does_not_wait_for_it(engine):
    def run(items: list[str]) -> list[str]:
        engine.check_caller()
        return items

    job = Job(Work(run, 1), ["outer"])
    engine.submit(job)
    with pytest.raises(EngineError, match="must not ask the same model"):
        job.result(10)


def test_progress_that_cannot_be_reported_fails_nothing(engine):
    told = []

    def report(n_items: int) -> None:
        told.append(n_items)
        msg = "I/O operation on closed file"
        raise ValueError(msg)

    job = Job(Work(list, 2), list("abcd"), report=report)
    engine.submit(job)
    assert job.result(10) == list("abcd")
    assert told == [2]


def test_a_fault_of_the_engine_s_own_fails_requests_and_not_the_engine(engine, caplog):
    def length(item: str) -> int:
        msg = f"no length of {item}"
        raise TypeError(msg)

    recorder = Recorder()
    hold(engine, recorder)
    jobs = [Job(Work(list, 4, length=length), ["a"]), Job(recorder.work, ["b"])]
    for job in jobs:
        engine.submit(job)
    recorder.gate.set()
    for job in jobs:
        with pytest.raises(PassError, match="no length of a"):
            job.result(10)
    assert "the engine failed" in caplog.text
    assert submit(engine, recorder, ["c"]).result(10) == ["c!"]
    assert engine.n_queued == 0


def test_batches_may_be_as_large_as_anybody_likes(engine):
    job = Job(Work(list, 10**30), list("abc"))
    engine.submit(job)
    assert job.result(10) == list("abc")


# --- threads and processes


def test_an_engine_that_nobody_uses_ends_its_thread(engine):
    recorder = Recorder()
    recorder.gate.set()
    submit(engine, recorder, ["a"]).result(10)
    [thread] = [thread for thread in threading.enumerate() if thread is engine._worker._thread]
    released = weakref.ref(engine)
    del engine
    other = released()
    assert other is not None  # the fixture holds it
    other._closing()
    thread.join(10)
    assert not thread.is_alive()


def test_work_takes_the_caller_s_number_of_threads(engine):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 2)

        def flow():
            return (yield Job(Work(lambda items: [torch.get_num_threads() for _ in items], 1), ["a"]))

        driver = Driver(engine, 10)
        assert driver.run(flow()) == [torch.get_num_threads()]
        assert asyncio.run(driver.arun(flow(), n_light=1)) == [torch.get_num_threads()]
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows cannot fork")
def test_a_child_begins_with_an_empty_queue_and_a_worker_of_its_own(engine):
    recorder = Recorder()
    hold(engine, recorder)
    waiting = submit(engine, recorder, ["a"])
    # The fork waits for the batch.
    threading.Timer(0.2, recorder.gate.set).start()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            own = Job(Work(lambda items: items, 4), ["b"])
            n_before = engine.n_queued
            engine.submit(own)
            status = 0 if (n_before, own.result(10)) == (0, ["b"]) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert waiting.result(10) == ["a!"]


def test_a_process_ends_cleanly_with_work_queued():
    program = """
import time
from kalm_integrations.core.engine import Engine
from kalm_integrations.core.flows import Driver
from kalm_integrations.core.jobs import Job, Work
engine = Engine()
jobs = [Job(Work(lambda items: time.sleep(0.05) or items, 1), list(range(1000)), is_bulk=bool(i)) for i in range(2)]
for job in jobs:
    engine.submit(job)
while not jobs[0].results:
    time.sleep(0.001)
print("end")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "end\n", "")


def test_what_waits_when_an_engine_ends_is_told(engine):
    recorder = Recorder()
    hold(engine, recorder)
    waiting = submit(engine, recorder, ["a"])
    engine._closing()
    with pytest.raises(EngineError, match="ended before this request's turn"):
        waiting.result(10)
    with pytest.raises(EngineError, match="it ends now"):
        submit(engine, recorder, ["b"])
    recorder.gate.set()


def test_nothing_of_a_request_is_held_afterwards(engine):
    class Item:
        pass

    item = Item()
    held = weakref.ref(item)
    job = Job(Work(lambda items: [None] * len(items), 4), [item])
    engine.submit(job)
    job.result(10)
    del item, job
    gc.collect()
    assert held() is None
