"""A payload store finds encodings by text: every reranker that has it is spared what one of them has encoded."""

from __future__ import annotations

import asyncio
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tools import servers
from tools.paths import ROOT

from kalm_integrations import EncodedPassage, KalmReranker, Passage
from kalm_integrations.core.passages import through
from kalm_integrations.core.passages.redis_store import RedisPayloadStore
from kalm_integrations.core.passages.stores import LmdbPayloadStore
from kalm_integrations.core.settings import CODEC_NAMES
from kalm_integrations.core.types import ENCODING_KEY
from kalm_integrations.errors import SettingsError, StoreError
from kalm_integrations.langchain import ByteStorePayloads

MakeReranker = Callable[..., KalmReranker]

TEXTS = [
    "The Panthers defense gave up just 308 points.",
    "Lift and drag of a slender wing.",
    "naïve café 東京",
    "a",
    "word " * 90,
]
QUERY = "who won the super bowl?"
MEGABYTE = 2**20


@pytest.fixture
def writer(make_reranker: MakeReranker, tmp_path: Path) -> KalmReranker:
    return make_reranker(payload_store=tmp_path / "store", write_through=True)


@pytest.fixture
def reader(make_reranker: MakeReranker, tmp_path: Path) -> KalmReranker:
    """Another reranker of the same store, which only reads; as good as another process."""
    return make_reranker(payload_store=tmp_path / "store")


# --- what one encodes the others find


def test_what_a_query_encoded_is_found_by_others_and_scores_the_same(writer, reader, make_reranker):
    expected = make_reranker().score(QUERY, TEXTS)
    assert writer.score(QUERY, TEXTS) == expected
    assert writer.flush(20)
    assert (writer.stats.passages_encoded, writer.stats.store_writes) == (len(TEXTS), len(TEXTS))
    reading = reader.read([*TEXTS, "new"])
    assert list(reading) == [*["found"] * len(TEXTS), "missing"]
    ranking = reader.rank(QUERY, reading)
    # A batch of another size may differ in last bits.
    scores = [place.score for place in sorted(ranking, key=lambda place: place.index)]
    assert scores[:-1] == pytest.approx(expected, abs=1e-6)
    stats = reader.stats
    assert (stats.passages_encoded, stats.store_hits, stats.cache_hits, stats.cache_misses) == (1, len(TEXTS), len(TEXTS), 1)
    # From now on memory has them, and the store is not asked again.
    again = reader.read([*TEXTS, "new"])
    assert list(again) == [*["found"] * len(TEXTS), "cached"]
    assert "store_hits" not in again.tally
    assert reader.stats.store_writes == 0
    # What was written through is in the store, too.
    assert list(writer.read(TEXTS)) == ["found"] * len(TEXTS)
    assert len(LmdbPayloadStore(reader._parts.given["payload_store"])) == len(TEXTS)
    assert scores == writer.score(QUERY, [*TEXTS, "new"])


def test_bulk_work_looks_first_and_writes_before_it_returns(writer, reader):
    made = writer.encode_to_metadata([*TEXTS, TEXTS[0]])
    assert writer.stats.store_writes == len(TEXTS)
    assert reader.encode_to_metadata([*TEXTS, TEXTS[0]]) == made
    stats = reader.stats
    assert (stats.passages_encoded, stats.store_hits, stats.cache_hits) == (0, len(TEXTS), len(TEXTS))
    assert [states.text_hash for states in reader.encode_passages(TEXTS)] == [
        s.text_hash for s in writer.encode_passages(TEXTS)
    ]
    assert (reader.stats.passages_encoded, reader.stats.cache_misses) == (0, 0)


def test_coroutines_find_and_write_too(writer, reader):
    async def ask(reranker: KalmReranker) -> list[float]:
        return await reranker.ascore(QUERY, TEXTS)

    expected = asyncio.run(ask(writer))
    assert writer.flush(20)
    assert asyncio.run(ask(reader)) == expected
    assert reader.stats.passages_encoded == 0
    assert asyncio.run(reader.aencode_to_metadata(TEXTS)) == writer.encode_to_metadata(TEXTS)


@pytest.mark.parametrize("codec", CODEC_NAMES)
@pytest.mark.parametrize("ratio", [1, 3, 4, 32, 128])
def test_every_codec_and_ratio_is_found_to_the_bit(make_reranker: MakeReranker, codec, ratio):
    store: dict[str, bytes] = {}
    settings = {"payload_store": store, "storage_codec": codec, "compression_ratio": ratio}
    texts = [" ".join(["word"] * n) for n in range(1, 20)]
    made = make_reranker(**settings, write_through=True).encode_passages(texts)
    assert set(store) == {encoding.payload_key for encoding in made}
    reader = make_reranker(**settings)
    found = reader.encode_passages(texts)
    assert reader.stats.passages_encoded == 0
    for one, other in zip(made, found, strict=True):
        assert one.to_metadata() == other.to_metadata()
        assert one.digest == other.digest
        assert torch.equal(one.states, other.states)


def test_references_and_texts_share_their_entries(make_reranker: MakeReranker):
    store: dict[str, bytes] = {}
    by_reference = make_reranker(payload_store=store, storage_mode="reference")
    metadata = by_reference.encode_to_metadata(TEXTS)
    reader = make_reranker(payload_store=store)
    assert list(reader.read(TEXTS)) == ["found"] * len(TEXTS)
    through_text = make_reranker(payload_store=(other := {}), write_through=True)
    through_text.encode_passages(TEXTS)
    assert other == store
    # A reference to what was put there by text is as good as any.
    passages = [Passage(text, m[ENCODING_KEY]) for text, m in zip(TEXTS, metadata, strict=True)]
    assert list(make_reranker(payload_store=other).read(passages)) == ["stored"] * len(TEXTS)


def test_another_setting_finds_nothing_of_ours(make_reranker: MakeReranker, other_checkpoint: Path):
    store: dict[str, bytes] = {}
    make_reranker(payload_store=store, write_through=True).encode_passages(TEXTS)
    for settings in (
        {"compression_ratio": 8},
        {"storage_codec": "rot4"},
        {"storage_codec": "bf16"},
        {"max_passage_tokens": 77},
        {"model": other_checkpoint},
    ):
        assert list(make_reranker(payload_store=store, **settings).read(TEXTS)) == ["missing"] * len(TEXTS)


def test_a_bf16_entry_serves_another_codec_only_where_that_overflows(make_reranker: MakeReranker):
    """Who shares a store decides no score: bf16 states are not what fp16 makes of the same passage."""
    store: dict[str, bytes] = {}
    make_reranker(payload_store=store, write_through=True, storage_codec="bf16").encode_passages(TEXTS)
    assert set(make_reranker(payload_store=store, storage_codec="fp16").read(TEXTS)) == {"missing"}
    writer = make_reranker(payload_store=store, write_through=True, storage_codec="fp16")
    [encoding] = make_reranker(compression_ratio=4).encode_passages(TEXTS[:1])
    large = EncodedPassage(
        encoding.states * 1e5, encoding.n_tokens, 4, encoding.fingerprint, encoding.text_hash, "fp16"
    ).as_stored()
    assert large.codec == "bf16"
    store.clear()
    store[large.payload_key] = large.to_payload()
    lookup = writer._ranker.reader
    lookup.__dict__["expected"] = type(lookup.expected)(
        encoding.fingerprint, encoding.states.shape[1], 1024, float(large.states.abs().max())
    )
    assert list(writer.read(TEXTS[:1])) == ["found"]


def test_max_inline_bytes_finds_the_ratio_that_it_would_choose(make_reranker: MakeReranker):
    store: dict[str, bytes] = {}
    settings = {"payload_store": store, "max_inline_bytes": 900, "storage_codec": "fp32"}
    made = make_reranker(**settings, write_through=True).encode_passages(TEXTS)
    assert len({encoding.compression_ratio for encoding in made}) > 1
    # A finer one, of somebody without the limit, is passed over.
    make_reranker(payload_store=store, write_through=True).encode_passages(TEXTS)
    reader = make_reranker(**settings)
    assert [e.compression_ratio for e in reader.encode_passages(TEXTS)] == [e.compression_ratio for e in made]
    assert reader.stats.passages_encoded == 0


def test_metadata_comes_first_and_stale_metadata_is_made_good_by_the_store(writer, reader, make_reranker, other_checkpoint):
    expected = writer.score(QUERY, TEXTS)
    assert writer.flush(20)
    stale = make_reranker(model=other_checkpoint).encode_to_metadata(TEXTS)
    passages = [Passage(text, m[ENCODING_KEY]) for text, m in zip(TEXTS, stale, strict=True)]
    passages[0] = Passage(TEXTS[0], "kalm1.garbage")
    reading = reader.read(passages)
    assert list(reading) == ["corrupt", *["stale"] * (len(TEXTS) - 1)]
    assert reader.score(QUERY, reading) == expected
    stats = reader.stats
    assert (stats.stale, stats.corrupt, stats.store_hits, stats.passages_encoded) == (len(TEXTS) - 1, 1, len(TEXTS), 0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda entry: entry[:-1],
        lambda entry: entry + b"x",
        lambda entry: b"",
        lambda entry: entry[:4],
        lambda entry: entry[:8],
        lambda entry: entry[:20] + bytes([entry[20] ^ 1]) + entry[21:],
        lambda entry: bytes([entry[0] ^ 1]) + entry[1:],
        lambda entry: bytes(len(entry)),
    ],
)
def test_damaged_entries_are_encoded_counted_and_replaced(make_reranker: MakeReranker, spoil):
    store: dict[str, bytes] = {}
    make_reranker(payload_store=store, write_through=True).encode_passages(TEXTS)
    sound = dict(store)
    store.update({key: spoil(entry) for key, entry in store.items()})
    reranker = make_reranker(payload_store=store, write_through=True)
    assert reranker.score(QUERY, TEXTS) == make_reranker().score(QUERY, TEXTS)
    assert (reranker.stats.corrupt, reranker.stats.passages_encoded) == (len(TEXTS), len(TEXTS))
    assert reranker.flush(20)
    assert store == sound


def test_entries_of_other_texts_do_not_pass_for_ones_own(make_reranker: MakeReranker):
    store: dict[str, bytes] = {}
    made = make_reranker(payload_store=store, write_through=True).encode_passages(TEXTS)
    keys = [encoding.payload_key for encoding in made]
    moved = dict(zip(keys, [store[key] for key in keys[1:] + keys[:1]], strict=True))
    store.update(moved)
    reranker = make_reranker(payload_store=store)
    assert reranker.score(QUERY, TEXTS) == make_reranker().score(QUERY, TEXTS)
    assert reranker.stats.corrupt == len(TEXTS)


# --- stores that fail, and other kinds


def test_a_store_that_cannot_be_written_costs_time_only(make_reranker: MakeReranker, caplog):
    class Full(dict):
        def update(self, *_args, **_kwargs):
            raise OSError(28, "No space left on device")

    reranker = make_reranker(payload_store=Full(), write_through=True)
    assert reranker.score(QUERY, TEXTS) == make_reranker().score(QUERY, TEXTS)
    assert reranker.flush(20)
    assert len(reranker.encode_passages([*TEXTS, "more"])) == len(TEXTS) + 1
    assert (reranker.stats.store_writes, reranker.stats.store_failures) == (0, 1)
    assert caplog.text.count("No space left") == 1


def test_an_answer_does_not_wait_for_the_store(make_reranker: MakeReranker):
    began, may_end = threading.Event(), threading.Event()

    class Slow(dict):
        def update(self, *args, **kwargs):
            began.set()
            assert may_end.wait(20)
            super().update(*args, **kwargs)

    store = Slow()
    reranker = make_reranker(payload_store=store, write_through=True)
    reranker.score(QUERY, TEXTS[:1])
    assert began.wait(20)
    for text in TEXTS[1:]:
        reranker.score(QUERY, [text])
    assert reranker.flush(0) is False
    assert not store
    may_end.set()
    assert reranker.flush(20)
    assert len(store) == len(TEXTS)


def test_what_a_store_that_hangs_cannot_take_is_not_kept_in_memory(make_reranker: MakeReranker, monkeypatch):
    monkeypatch.setattr("kalm_integrations.core.write_queue.MAX_WAITING_DOCUMENTS", 2)
    began, may_end = threading.Event(), threading.Event()

    class Hanging(dict):
        def update(self, *args, **kwargs):
            began.set()
            assert may_end.wait(20)

    reranker = make_reranker(payload_store=Hanging(), write_through=True)
    reranker.score(QUERY, TEXTS[:1])
    assert began.wait(20)
    for index in range(20):
        reranker.score(QUERY, [f"text {index}"])
    assert len(reranker._ranker.reader.through._waiting) <= 2
    may_end.set()
    assert reranker.flush(20)


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    with servers.redis(tmp_path) as (url, _):
        yield url


def test_redis_serves_several_rerankers_by_its_url(make_reranker: MakeReranker, redis_url, caplog):
    writer = make_reranker(payload_store=redis_url, write_through=True)
    expected = writer.score(QUERY, TEXTS)
    assert writer.flush(20)
    reader = make_reranker(payload_store=redis_url)
    assert reader.score(QUERY, TEXTS) == expected
    assert (reader.stats.store_hits, reader.stats.passages_encoded) == (len(TEXTS), 0)
    store = RedisPayloadStore(redis_url)
    assert len(store) == len(TEXTS)
    assert set(store) == {encoding.payload_key for encoding in reader.encode_passages(TEXTS)}
    key = next(iter(store))
    assert store.get_many([key, "absent"]) == {key: store[key]}
    store["kept:1"] = b"\0\xff"
    assert store["kept:1"] == b"\0\xff"
    del store["kept:1"]
    with pytest.raises(KeyError):
        store["kept:1"]
    with pytest.raises(KeyError):
        del store["kept:1"]


def test_a_redis_that_is_gone_costs_time_only_and_its_password_is_not_shown(make_reranker: MakeReranker, caplog):
    url = "redis://user:secret@127.0.0.1:1/0"
    reranker = make_reranker(payload_store=url, write_through=True)
    assert reranker.score(QUERY, TEXTS) == make_reranker().score(QUERY, TEXTS)
    assert reranker.flush(20)
    assert reranker.stats.store_failures == 2  # one read, one write: then it is left alone for a while
    assert "secret" not in caplog.text + repr(reranker) + repr(RedisPayloadStore(url))


def test_byte_stores_of_langchain_are_asked_in_one_call(make_reranker: MakeReranker):
    from langchain_core.stores import InMemoryByteStore

    calls = []

    class Counting(InMemoryByteStore):
        def mget(self, keys):
            calls.append(list(keys))
            return super().mget(keys)

    store = ByteStorePayloads(Counting())
    make_reranker(payload_store=store, write_through=True).encode_passages(TEXTS)
    calls.clear()
    assert list(make_reranker(payload_store=store).read(TEXTS)) == ["found"] * len(TEXTS)
    assert len(calls) == 1


def test_what_memory_has_is_light_work_and_what_the_store_is_asked_for_is_not(writer, make_reranker):
    """Light work is done by the engine's thread, which no store may hold up."""

    def n_light(reranker: KalmReranker, passages: list) -> int | None:
        return reranker._ranker.n_light([passages])

    assert n_light(writer, TEXTS) is None
    [metadata, *_] = writer.encode_to_metadata(TEXTS)
    assert n_light(writer, TEXTS) == len(TEXTS)
    assert n_light(writer, [*TEXTS, "new"]) is None
    assert n_light(writer, [*TEXTS, Passage(TEXTS[0], metadata[ENCODING_KEY])]) is None
    assert n_light(make_reranker(), [*TEXTS, "new"]) == len(TEXTS) + 1


# --- several processes


PROCESS = """
import sys
from kalm_integrations import KalmReranker
reranker = KalmReranker.from_pretrained(sys.argv[1], payload_store=sys.argv[2], write_through=True, storage_codec="fp32")
print(reranker.score(sys.argv[3], sys.argv[4:]))
print(reranker.stats.passages_encoded)
"""


def test_another_process_finds_what_this_one_made_and_its_end_waits_for_what_it_has_to_write(
    tiny_checkpoint, tmp_path, make_reranker
):
    command = [sys.executable, "-c", PROCESS, str(tiny_checkpoint), str(tmp_path / "store"), QUERY, *TEXTS]
    first, second = (subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout for _ in range(2))
    assert [output.splitlines()[1] for output in (first, second)] == [str(len(TEXTS)), "0"]
    assert first.splitlines()[0] == second.splitlines()[0]
    assert list(make_reranker(payload_store=tmp_path / "store").read(TEXTS)) == ["found"] * len(TEXTS)


def _score_in_child(reranker: KalmReranker, texts: list[str], answers: multiprocessing.Queue) -> None:
    scores = reranker.score(QUERY, texts)
    answers.put((scores, reranker.flush(20), reranker.stats.store_writes))


def test_a_forked_child_finds_and_writes(writer, make_reranker):
    expected = writer.score(QUERY, TEXTS)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    before = writer.stats.store_writes
    child = context.Process(target=_score_in_child, args=(writer, [*TEXTS, "of the child"], answers))
    child.start()
    scores, is_flushed, n_writes = answers.get(timeout=60)
    child.join(20)
    # A batch of another size may differ in last bits.
    assert scores[:-1] == pytest.approx(expected, abs=1e-6)
    assert scores == writer.score(QUERY, [*TEXTS, "of the child"])
    assert is_flushed
    assert n_writes - before >= 1
    assert writer.flush(20)
    assert list(make_reranker(payload_store=writer._parts.given["payload_store"]).read(["of the child"])) == ["found"]


# --- a bound


def test_a_bounded_store_keeps_what_was_used_last(tmp_path: Path):
    store = LmdbPayloadStore(tmp_path)
    limit = 40 * 5 * 4096
    store.update({"kept": b"x" * 12_000})
    rounds = [{f"{i}:{j}": bytes(12_000) for j in range(10)} for i in range(40)]
    n_evicted = 0
    for payloads in rounds:
        # The first are asked for again and again.
        n_evicted += store.keep_recent(payloads, rounds[0].keys(), limit)
        assert store.nbytes <= limit
    assert n_evicted > 300
    assert n_evicted == 401 - len(store)
    there = set(store)
    assert {"kept", *rounds[0], *rounds[-1]} <= there
    assert not there & rounds[1].keys()
    # Freed pages are used again.
    assert (tmp_path / "data.mdb").stat().st_size < 2 * limit
    assert store.keep_recent({}, [], limit) == 0
    # What was written to be referred to is kept from then on.
    store.update(rounds[-1])
    for i in range(40):
        store.keep_recent({f"new:{i}:{j}": bytes(12_000) for j in range(10)}, [], limit)
    assert {"kept", *rounds[-1]} <= set(store)


def test_a_reranker_keeps_to_max_store_bytes(make_reranker: MakeReranker, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(through, "TOUCHES", 1)
    reranker = make_reranker(
        payload_store=tmp_path, write_through=True, max_store_bytes=MEGABYTE, compression_ratio=1, storage_codec="fp32"
    )
    hot = ["hot " * 300]
    for index in range(60):
        reranker.score(QUERY, [f"{index} " + "word " * 300, *hot])
        assert reranker.flush(20)
    assert reranker.store_bytes <= MEGABYTE
    stats = reranker.stats
    assert 0 < stats.store_evictions < stats.store_writes == 61
    again = make_reranker(payload_store=tmp_path, compression_ratio=1)
    assert list(again.read([*hot, "59 " + "word " * 300, "0 " + "word " * 300])) == ["found", "found", "missing"]


# --- settings


def test_settings_without_effect_are_refused(make_reranker: MakeReranker, tmp_path: Path):
    with pytest.raises(SettingsError, match="write_through=True needs a payload_store to write to, but got None"):
        make_reranker(write_through=True)
    with pytest.raises(SettingsError, match="max_store_bytes bounds what write_through=True puts"):
        make_reranker(payload_store=tmp_path, max_store_bytes=MEGABYTE)
    with pytest.raises(SettingsError, match="max_store_bytes bounds the folder of an LMDB store"):
        make_reranker(payload_store={}, write_through=True, max_store_bytes=MEGABYTE)
    with pytest.raises(SettingsError, match="max_store_bytes"):
        make_reranker(payload_store=tmp_path, write_through=True, max_store_bytes=5)
    with pytest.raises(StoreError, match="URL that redis-py can read"):
        make_reranker(payload_store="redis://host:port/0")


def test_a_reranker_without_write_through_has_nothing_to_flush(make_reranker: MakeReranker):
    reranker = make_reranker()
    assert reranker.flush(0)
    assert reranker.store_bytes is None


# --- cutting texts for clients


def test_texts_are_cut_behind_their_first_tokens(make_reranker: MakeReranker):
    reranker = make_reranker()
    tokenizer = reranker._parts.runtime.tokenizer(allow_special_tokens=False)
    texts = [*TEXTS, "", "naïve \ud83d\ude00 café " * 50, "x" * 5000]
    for limit in (1, 5, 64):
        cut = reranker.truncate(texts, limit)
        for text, short in zip(texts, cut, strict=True):
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16")
            assert whole.startswith(short)
            [ids], [all_ids] = tokenizer.passages([short]), tokenizer.passages([whole])
            assert len(ids) <= limit or ids == all_ids[: len(ids)]
            assert short == whole or len(all_ids) > limit
    with pytest.raises(SettingsError, match="max_tokens must be a positive whole number"):
        reranker.truncate(["a"], 0)
