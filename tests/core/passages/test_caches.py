"""Encodings in memory stay within their bytes, and payloads on disk behave like a dict that outlives the process."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import MutableMapping
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tools.paths import ROOT

from kalm_integrations import EncodedPassage
from kalm_integrations.core.passages.caches import BoundedCache
from kalm_integrations.core.passages.stores import LmdbPayloadStore

ROW_BYTES = 40


def make_encoding(n_states: int = 1) -> EncodedPassage:
    """An encoding of `n_states` times 40 bytes."""
    return EncodedPassage(torch.zeros(n_states, 10), n_states, 1, "f" * 32, "0" * 32, "fp32")


def key(name: object) -> tuple[str, str]:
    return ("fingerprint", str(name))


# --- in memory


def test_the_longest_unused_is_dropped_first_and_reading_counts_as_use():
    cache = BoundedCache(3 * ROW_BYTES)
    cache.put_many({key(name): make_encoding() for name in "abc"})
    assert set(cache.get_many([key("a")])) == {key("a")}
    cache.put_many({key("d"): make_encoding()})
    assert set(cache.get_many(map(key, "abcd"))) == {key("a"), key("c"), key("d")}


def test_one_that_is_larger_than_the_bound_is_not_kept_and_drops_nothing():
    cache = BoundedCache(3 * ROW_BYTES)
    cache.put_many({key("small"): make_encoding()})
    cache.put_many({key("large"): make_encoding(4)})
    assert set(cache.get_many(map(key, ["small", "large"]))) == {key("small")}


def test_no_bytes_keep_nothing():
    cache = BoundedCache(0)
    cache.put_many({key("a"): make_encoding()})
    assert (len(cache), cache.nbytes, cache.get_many([key("a")])) == (0, 0, {})


def test_clear_drops_everything():
    cache = BoundedCache(3 * ROW_BYTES)
    cache.put_many({key("a"): make_encoding()})
    cache.clear()
    assert (len(cache), cache.nbytes, cache.max_bytes) == (0, 0, 3 * ROW_BYTES)


def test_the_same_text_of_another_fingerprint_is_another_entry():
    cache = BoundedCache(10 * ROW_BYTES)
    cache.put_many({("one", "text"): make_encoding()})
    assert cache.get_many([("other", "text")]) == {}


@given(
    max_rows=st.integers(0, 8),
    calls=st.lists(
        st.tuples(st.booleans(), st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), max_size=4)), max_size=20
    ),
)
def test_the_cache_never_holds_more_than_its_bytes_and_only_what_was_put(max_rows, calls):
    cache = BoundedCache(max_rows * ROW_BYTES)
    put: dict[tuple[str, str], list[EncodedPassage]] = {}
    for is_put, entries in calls:
        if is_put:
            new = {key(name): make_encoding(rows) for name, rows in entries}
            cache.put_many(new)
            for name, entry in new.items():
                put.setdefault(name, []).append(entry)
        held = cache.get_many(map(key, range(10)))
        assert cache.nbytes == sum(entry.nbytes for entry in held.values()) <= cache.max_bytes
        assert len(cache) == len(held)
        assert all(any(entry is old for old in put[name]) for name, entry in held.items())


def test_the_bound_holds_under_threads():
    cache = BoundedCache(5 * ROW_BYTES)
    errors = []

    def use(thread: int) -> None:
        try:
            for i in range(300):
                cache.put_many({key((thread + i) % 11): make_encoding(1 + i % 3)})
                cache.get_many(map(key, range(11)))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    held = cache.get_many(map(key, range(11)))
    assert cache.nbytes == sum(entry.nbytes for entry in held.values()) <= cache.max_bytes


# --- on disk

keys = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=100)
operations = st.one_of(
    st.tuples(st.just("set"), keys, st.binary(max_size=50)),
    st.tuples(st.just("update"), st.dictionaries(keys, st.binary(max_size=50), max_size=3), st.none()),
    st.tuples(st.sampled_from(["delete", "get", "pop", "setdefault", "contains"]), keys, st.none()),
    st.tuples(st.just("clear"), st.none(), st.none()),
)


def apply(mapping: MutableMapping[str, bytes], name: str, argument, value):
    """Apply an operation and return its result, or the name of its error."""
    try:
        match name:
            case "set":
                mapping[argument] = value
            case "update":
                mapping.update(argument)
            case "delete":
                del mapping[argument]
            case "get":
                return mapping[argument]
            case "pop":
                return mapping.pop(argument)
            case "setdefault":
                return mapping.setdefault(argument, b"default")
            case "contains":
                return argument in mapping
            case "clear":
                mapping.clear()
    except KeyError as error:
        return repr(error)


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> LmdbPayloadStore:
    return LmdbPayloadStore(tmp_path_factory.mktemp("shared"), max_bytes=2**24)


@settings(deadline=None, max_examples=25)
@given(operations=st.lists(operations, max_size=8))
def test_a_payload_store_does_what_a_dict_does(shared_store, operations):
    shared_store.clear()
    model: dict[str, bytes] = {}
    for operation in operations:
        assert apply(shared_store, *operation) == apply(model, *operation)
        assert dict(shared_store) == model
        assert len(shared_store) == len(model)
    # LMDB keeps keys in the order of their bytes.
    assert list(shared_store) == sorted(model, key=str.encode)
    assert isinstance(shared_store, MutableMapping)


def test_payloads_can_be_deleted_while_going_through_them(tmp_path):
    store = LmdbPayloadStore(tmp_path)
    store.update({str(i): b"x" for i in range(10)})
    for name in store:
        del store[name]
    assert len(store) == 0


def test_an_update_is_written_whole_or_not_at_all(tmp_path):
    store = LmdbPayloadStore(tmp_path)
    with pytest.raises(TypeError):
        store.update({"a": b"x", "b": "no bytes"})
    assert dict(store) == {}


def test_payloads_outlive_the_store(tmp_path):
    store = LmdbPayloadStore(tmp_path / "made" / "here")
    store["a"] = b"\x00\xff"
    del store
    assert LmdbPayloadStore(tmp_path / "made" / "here")["a"] == b"\x00\xff"


def test_a_folder_can_be_opened_many_times_in_a_process(tmp_path):
    """An encoder at ingest and a ranker at query time are two rerankers that name one folder."""
    one, another = LmdbPayloadStore(tmp_path), LmdbPayloadStore(str(tmp_path / "x" / ".."))
    one["a"] = b"x"
    assert another["a"] == b"x"
    del one
    gc.collect()
    assert another["a"] == b"x"


def test_more_reads_than_lmdbs_default_may_be_under_way(tmp_path):
    """LMDB allows 126 readers of all processes together unless told otherwise."""
    store = LmdbPayloadStore(tmp_path)
    store.update({"a": b"x", "b": b"x"})
    with ExitStack() as stack:
        transactions = [stack.enter_context(store._environment.begin()) for _ in range(200)]
        assert {transaction.get(b"a") for transaction in transactions} == {b"x"}
        assert store["b"] == b"x"


def test_threads_read_while_one_writes(tmp_path):
    store = LmdbPayloadStore(tmp_path)
    store.update({str(i): bytes([i]) * 1000 for i in range(50)})
    errors = []

    def read() -> None:
        for _ in range(20):
            errors.extend(i for i in range(50) if store[str(i)] != bytes([i]) * 1000)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for i in range(50, 60):
        store[str(i)] = b"x"
    for thread in threads:
        thread.join()
    assert (errors, len(store)) == ([], 60)


PROCESSES = """
import os, sys
from kalm_integrations import EncodedPassage
from kalm_integrations.core.passages.stores import LmdbPayloadStore

folder, references = sys.argv[1], sys.argv[2:]
children = []
for number in range(8):
    child = os.fork()
    if child == 0:
        try:
            store = LmdbPayloadStore(folder)
            store[f"process {number}"] = b"was here"
            for repeat in range(20):
                for reference in references:
                    EncodedPassage.from_metadata(reference, store)
        except BaseException as error:
            os.write(2, f"{error!r}\\n".encode())
            os._exit(1)
        os._exit(0)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


def test_many_processes_read_and_write_one_folder(tmp_path):
    store = LmdbPayloadStore(tmp_path)
    encodings = [EncodedPassage(torch.randn(20, 30), 20, 1, "f" * 32, f"{i:032x}", "fp16") for i in range(20)]
    references = [encoding.to_metadata(store) for encoding in encodings]
    done = subprocess.run(
        [sys.executable, "-c", PROCESSES, str(tmp_path), *references],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(name for name in store if name.startswith("process")) == [f"process {i}" for i in range(8)]
