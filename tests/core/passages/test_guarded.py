"""Nothing from a store fails a query, and no failure is silent: it is logged once and counted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import pytest
from tools.checkpoints import TEXTS

from kalm_integrations import EncodedPassage, KalmReranker, Passage
from kalm_integrations.core.passages.guarded import PAUSE_SECONDS, SLOW_SECONDS, GuardedStore
from kalm_integrations.core.passages.stores import LmdbPayloadStore
from kalm_integrations.core.types import ENCODING_KEY
from kalm_integrations.errors import StoreError

MakeReranker = Callable[..., KalmReranker]

QUERY = "Which team won?"
PASSAGES = [*TEXTS[:3], "two words"]


class FaultyStore(MutableMapping[str, bytes]):
    """A dict whose calls do what they are told, beside being counted."""

    def __init__(self, values: dict[str, bytes] | None = None) -> None:
        self.values = values or {}
        self.on_read: Callable[[Any], Any] = lambda value: value
        self.on_write: Callable[[], None] = lambda: None
        self.calls: Counter[str] = Counter()

    def __getitem__(self, key: str) -> bytes:
        self.calls["read"] += 1
        return self.on_read(self.values[key])

    def __setitem__(self, key: str, value: bytes) -> None:
        self.calls["write"] += 1
        self.on_write()
        self.values[key] = value

    def __delitem__(self, key: str) -> None:
        del self.values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)


class Clock:
    """A time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def fail(error: BaseException) -> Callable[..., Any]:
    def do(*_: object) -> None:
        raise error

    return do


ERRORS = [OSError("disk gone"), TimeoutError(), RuntimeError("x" * 10_000), KeyError(), MemoryError(), StoreError("ours")]


@pytest.fixture
def guarded() -> tuple[GuardedStore, FaultyStore, Clock, Counter[str]]:
    """A guard around a store with values a to c, with its clock and its counter."""
    store, clock, counted = FaultyStore({key: key.encode() for key in "abc"}), Clock(), Counter()
    guard = GuardedStore(store, "prefix_store", lambda **n: counted.update(n), must_write=False, clock=clock)
    return guard, store, clock, counted


def stored(reranker: KalmReranker) -> list[Passage]:
    made = reranker.encode_to_metadata(PASSAGES)
    return [Passage(text, metadata[ENCODING_KEY]) for text, metadata in zip(PASSAGES, made, strict=True)]


# --- the guard


def test_a_sound_store_is_passed_through(guarded):
    guard, store, _, counted = guarded
    assert [guard.get(key) for key in "abx"] == [b"a", b"b", None]
    guard["d"] = b"d"
    del guard["a"]
    assert (dict(guard), len(guard), "a" in guard) == ({"b": b"b", "c": b"c", "d": b"d"}, 3, False)
    assert dict(guard) == store.values
    assert counted == {}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_reading_raises_is_a_miss_and_costs_one_call_in_a_while(guarded, error, caplog):
    guard, store, clock, counted = guarded
    store.get = fail(error)  # a KeyError of the mapping itself would be an ordinary miss
    assert [guard.get(key) for key in "aab"] == [None] * 3
    assert counted == {"store_failures": 1}
    clock.now += PAUSE_SECONDS
    assert [guard.get(key) for key in "aab"] == [None] * 3
    assert counted == {"store_failures": 2}
    del store.get
    clock.now += PAUSE_SECONDS - 1
    assert guard.get("a") is None, "still left alone"
    clock.now += 1
    assert [guard.get(key) for key in "ab"] == [b"a", b"b"]
    [record] = caplog.records
    assert (record.levelno, type(error).__name__ in record.getMessage()) == (logging.WARNING, True)
    assert len(record.getMessage()) < 500


@pytest.mark.parametrize(
    "value", ["text", bytearray(b"x"), memoryview(b"x"), 5, [b"x"], object()], ids=lambda v: type(v).__name__
)
def test_what_is_no_bytes_is_a_miss_and_leaves_the_others(guarded, value, caplog):
    guard, store, _, counted = guarded
    store.values["a"] = value
    assert [guard.get(key) for key in "aba"] == [None, b"b", None]
    assert counted == {"store_failures": 2}
    assert [type(value).__name__ in record.getMessage() for record in caplog.records] == [True]


def test_a_slow_answer_is_taken_and_is_the_last_for_a_while(guarded, caplog):
    guard, store, clock, counted = guarded

    def wait(value: bytes) -> bytes:
        clock.now += SLOW_SECONDS + 0.5
        return value

    store.on_read = wait
    assert [guard.get(key) for key in "abc"] == [b"a", None, None]
    assert (store.calls["read"], counted) == (1, {"store_failures": 1})
    assert "took 2.5 s" in caplog.text
    guard.update({"d": b"d"})
    assert store.values["d"] == b"d", "writing is not what is slow"


def test_writing_fails_apart_from_reading(guarded, caplog):
    """A store that is full or read-only still answers."""
    guard, store, clock, counted = guarded
    store.on_write = fail(OSError("No space left on device"))
    for _ in range(3):
        guard.update({"d": b"d", "e": b"e"})
    assert (store.calls["write"], counted) == (1, {"store_failures": 1})
    assert guard.get("a") == b"a"
    assert "No space left on device" in caplog.text
    store.on_write = lambda: None
    clock.now += PAUSE_SECONDS
    guard.update({"d": b"d"})
    assert guard.get("d") == b"d"


def test_what_must_be_written_raises_each_time(caplog):
    store, counted = FaultyStore(), Counter()
    guard = GuardedStore(store, "payload_store", lambda **n: counted.update(n), must_write=True)
    store.on_write = fail(OSError("No space left on device"))
    for _ in range(2):
        with pytest.raises(StoreError, match=r"payload_store cannot be used: FaultyStore raised OSError: No space left"):
            guard["a"] = b"a"
    assert (store.calls["write"], counted) == (2, {"store_failures": 2})
    store.on_write = lambda: None
    guard["a"] = b"a"
    assert guard["a"] == b"a"
    assert caplog.records == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit()], ids=lambda error: type(error).__name__)
def test_interrupts_pass_through(guarded, error):
    guard, store, _, counted = guarded
    store.on_read = store.on_write = fail(error)
    with pytest.raises(type(error)):
        guard.get("a")
    with pytest.raises(type(error)):
        guard.update({"a": b"a"})
    assert counted == {}


# --- in a reranker


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_payloads_that_cannot_be_read_are_computed(make_reranker: MakeReranker, error, caplog):
    store = FaultyStore()
    passages = stored(make_reranker(storage_mode="reference", payload_store=store, storage_codec="fp32"))
    expected = make_reranker().score(QUERY, PASSAGES)
    reranker = make_reranker(payload_store=store, storage_codec="fp32")
    store.on_read = fail(error)
    store.calls.clear()
    is_miss = isinstance(error, KeyError)  # by the reference, and by the text: in one piece, and in windows
    assert reranker.score(QUERY, passages) == expected
    stats = reranker.stats
    assert (stats.corrupt, stats.passages_encoded, stats.metadata_hits) == (len(PASSAGES), len(PASSAGES), 0)
    assert (stats.store_failures, store.calls["read"]) == ((0, 3 * len(PASSAGES)) if is_miss else (1, 1))
    assert caplog.text.count("payload_store: reading failed") == (0 if is_miss else 1)


@pytest.mark.parametrize("value", [None, "text", 5, bytearray(b"x"), object()], ids=lambda value: type(value).__name__)
def test_payloads_and_states_that_are_no_bytes_are_computed(make_reranker: MakeReranker, value):
    store, prefixes = FaultyStore(), FaultyStore()
    settings = {"payload_store": store, "prefix_store": prefixes, "storage_codec": "fp32"}
    writer = make_reranker(storage_mode="reference", **settings)
    passages = stored(writer)
    writer.prepare(passages)
    expected = make_reranker().score(QUERY, PASSAGES)
    n_failures = 0 if value is None else len(PASSAGES)
    prefixes.on_read = lambda _: value
    reranker = make_reranker(**settings)
    assert reranker.score(QUERY, passages) == expected
    assert (reranker.stats.prefix_misses, reranker.stats.store_failures) == (len(PASSAGES), n_failures)
    store.on_read = lambda _: value
    reranker = make_reranker(**settings)
    assert reranker.score(QUERY, passages) == expected
    # Asked for by reference and by text. What is encoded anew has the prefix states of what was stored, asked for, too.
    assert (reranker.stats.corrupt, reranker.stats.store_failures) == (len(PASSAGES), 3 * n_failures)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_prefix_states_that_cannot_be_read_or_kept_are_computed(make_reranker: MakeReranker, error):
    expected = make_reranker().score(QUERY, PASSAGES)
    store = FaultyStore()
    store.get = store.on_write = fail(error)
    reranker = make_reranker(prefix_store=store, prefix_cache_bytes=0)
    for _ in range(2):
        assert reranker.score(QUERY, PASSAGES) == pytest.approx(expected, abs=1e-6)
    assert (reranker.stats.store_failures, store.calls["write"], len(store)) == (2, 1, 0)
    assert (reranker.stats.prefix_misses, reranker.stats.prefix_store_hits) == (2 * len(PASSAGES), 0)


def test_a_reference_is_not_made_to_what_could_not_be_written(make_reranker: MakeReranker):
    store = FaultyStore()
    reranker = make_reranker(storage_mode="reference", payload_store=store, cache_bytes=0)
    store.on_write = fail(PermissionError("read-only"))
    with pytest.raises(StoreError, match="PermissionError: read-only"):
        reranker.encode_to_metadata(PASSAGES)
    ranking = reranker.rank(QUERY, PASSAGES)
    assert len(ranking) == len(PASSAGES)
    with pytest.raises(StoreError, match="PermissionError: read-only"):
        _ = ranking.made
    store.on_write = lambda: None
    assert len(ranking.made) == len(store) == len(PASSAGES)


def test_an_encoding_written_or_read_by_itself_says_that_its_store_failed(make_reranker: MakeReranker):
    store = FaultyStore()
    [encoding] = make_reranker().encode_passages(PASSAGES[:1])
    value = encoding.to_metadata(store)
    store.on_read = store.on_write = fail(ConnectionError("refused"))
    with pytest.raises(StoreError, match="ConnectionError: refused"):
        encoding.to_metadata(store)
    with pytest.raises(StoreError, match="ConnectionError: refused"):
        EncodedPassage.from_metadata(value, store)


def test_a_full_lmdb_store_answers_and_the_query_is_computed(make_reranker: MakeReranker, tmp_path):
    store = LmdbPayloadStore(tmp_path, max_bytes=2**17)
    reranker = make_reranker(prefix_store=store, prefix_cache_bytes=0)
    expected = make_reranker(prefix_cache_bytes=0).score(QUERY, PASSAGES)
    assert reranker.score(QUERY, PASSAGES) == pytest.approx(expected, abs=1e-6)
    assert (reranker.stats.store_failures, len(store)) == (1, 0)
    writer = make_reranker(storage_mode="reference", payload_store=store, storage_codec="fp32", compression_ratio=1)
    with pytest.raises(StoreError, match="larger max_bytes"):
        writer.encode_to_metadata([f"{text} {i}" * 20 for text in PASSAGES for i in range(40)])
