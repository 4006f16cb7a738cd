"""Prefix states: what a query adds is all that it costs, and no score shows it."""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tools import plain_format
from tools.checkpoints import TEXTS, make_checkpoint
from tools.parity import TOLERANCE, Parity

from kalm_integrations import EncodedPassage, KalmReranker, Passage, RankedPassage
from kalm_integrations.core.model.prefix_states import PrefixStates
from kalm_integrations.core.passages import prefixes
from kalm_integrations.errors import SettingsError

MakeReranker = Callable[..., KalmReranker]

PASSAGES = [*TEXTS[:3], "", "one", "two words"]
FIRST, SECOND = "Which team won?", "  東京 «who»?"


def n_bytes_each(make_reranker: MakeReranker, texts: Sequence[str]) -> list[int]:
    """Return the bytes of each passage's prefix states."""
    sizes = []
    for text in texts:
        reranker = make_reranker()
        reranker.score(FIRST, [text])
        sizes.append(reranker._ranker.scorer.prefixes.nbytes)
    return sizes


@pytest.mark.parametrize("window", [4, 30, 80])
def test_windows_shorter_than_the_prompt(tmp_path: Path, window: int) -> None:
    """A window that ends inside the prefix hides the same tokens whether they were cached or not."""
    parity = Parity(make_checkpoint(tmp_path, sliding_window=window))
    for query in (FIRST, "a long query " * 30):
        assert max(parity.differences(query, TEXTS[:3], instruction="Find it. " * 5).values()) <= TOLERANCE


def test_a_small_cache_forgets_and_computes_again(make_reranker: MakeReranker) -> None:
    """Evicted states are made anew: same scores, and the cache stays within its bound."""
    expected = make_reranker(prefix_cache_bytes=0).score(SECOND, PASSAGES)
    bound = max(n_bytes_each(make_reranker, PASSAGES))
    small = make_reranker(prefix_cache_bytes=bound)
    for _ in range(2):
        for passage, score in zip(PASSAGES, expected, strict=True):
            assert small.score(SECOND, [passage]) == pytest.approx([score], abs=1e-6)
            assert small._ranker.scorer.prefixes.nbytes <= bound
    assert small.stats.prefix_misses == 2 * len(PASSAGES)


def test_what_does_not_fit_leaves_the_rest_in_memory(make_reranker: MakeReranker) -> None:
    """More candidates than the cache holds: those in it stay, and serve the next query; the others are scored whole."""
    expected = make_reranker(prefix_cache_bytes=0).score(SECOND, PASSAGES)
    sizes = n_bytes_each(make_reranker, PASSAGES)
    reranker = make_reranker(prefix_cache_bytes=max(sizes) * 2)
    n_kept = reranker.score(FIRST, PASSAGES) and len(reranker._ranker.scorer.prefixes)
    assert 2 <= n_kept < len(PASSAGES)
    assert reranker.score(SECOND, PASSAGES[::-1]) == pytest.approx(expected[::-1], abs=1e-6)
    assert reranker.stats.prefix_hits == reranker.stats.prefix_misses == n_kept


def test_a_cache_too_small_for_any_passage_keeps_nothing(make_reranker: MakeReranker) -> None:
    reranker = make_reranker(prefix_cache_bytes=1)
    expected = make_reranker(prefix_cache_bytes=0).score(FIRST, PASSAGES)
    assert reranker.score(FIRST, PASSAGES) == pytest.approx(expected, abs=1e-6)
    assert reranker.stats.prefix_hits == reranker.stats.prefix_misses == 0


def test_states_belong_to_an_instruction(make_reranker: MakeReranker) -> None:
    """Another instruction computes its own states and leaves those of the first."""
    reranker, plain = make_reranker(), make_reranker(prefix_cache_bytes=0)
    n = len(PASSAGES)
    for instruction, hits, misses in (
        (None, 0, n),
        ("Find the team.", 0, 2 * n),
        (None, n, 2 * n),
        ("Find the team.", 2 * n, 2 * n),
    ):
        scores = reranker.score(FIRST, PASSAGES, instruction)
        assert scores == pytest.approx(plain.score(FIRST, PASSAGES, instruction), abs=1e-6)
        assert (reranker.stats.prefix_hits, reranker.stats.prefix_misses) == (hits, misses)


def test_states_belong_to_the_encoding_they_were_made_of(make_reranker: MakeReranker) -> None:
    """One text at several ratios, and with rounded states, is scored from each one's own states."""
    reranker = make_reranker(compression_ratio=8)
    (fine,) = make_reranker(compression_ratio=1).encode_passages(TEXTS[:1])
    (coarse,) = reranker.encode_passages(TEXTS[:1])
    rounded = replace(coarse, codec="rot2").as_stored()
    variants = [coarse, rounded, fine.pool(16)]
    expected = [make_reranker(compression_ratio=8, prefix_cache_bytes=0).score(FIRST, [variant])[0] for variant in variants]
    assert len({round(score, 6) for score in expected}) == 3, "the variants must differ for this test to say anything"
    for _ in range(2):
        assert [reranker.score(FIRST, [variant])[0] for variant in variants] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_states_in_half_precision(make_reranker: MakeReranker, dtype: str, tolerance: float) -> None:
    """Half the bytes; scores are close, and do not depend on whether the states were there."""
    exact = make_reranker()
    half = make_reranker(prefix_dtype=dtype)
    assert half.score(FIRST, PASSAGES) == pytest.approx(exact.score(FIRST, PASSAGES), abs=tolerance)
    assert half._ranker.scorer.prefixes.nbytes * 2 == exact._ranker.scorer.prefixes.nbytes
    first = make_reranker(prefix_dtype=dtype).score(SECOND, PASSAGES)
    assert half.score(SECOND, PASSAGES) == pytest.approx(first, abs=1e-6)


def test_an_unknown_dtype_or_a_negative_bound_is_refused(make_reranker: MakeReranker) -> None:
    with pytest.raises(SettingsError, match=r"prefix_dtype.*'int4'"):
        make_reranker(prefix_dtype="int4")
    with pytest.raises(SettingsError, match=r"prefix_cache_bytes.*-1"):
        make_reranker(prefix_cache_bytes=-1)


QUERIES = ["who?", FIRST, SECOND, "", "what is the theory of wings in a stream " * 4]


def check_like_rank(reranker: KalmReranker, plain: KalmReranker, lists: Sequence[Sequence[str]], **cut: object) -> None:
    rankings = reranker.rank_many(QUERIES, lists, **cut)
    for query, passages, ranking in zip(QUERIES, lists, rankings, strict=True):
        expected = plain.rank(query, passages, **cut)
        assert [r.index for r in ranking] == [r.index for r in expected]
        assert [r.score for r in ranking] == pytest.approx([r.score for r in expected], abs=1e-6)
        assert all(type(r) is RankedPassage for r in ranking)


@pytest.mark.parametrize("cache_bytes", [None, 0, 1, 60_000])
@pytest.mark.parametrize("cut", [{}, {"top_k": 2}, {"score_threshold": 0.5}, {"instruction": "Find the team."}])
def test_many_queries_rank_like_one_after_the_other(
    make_reranker: MakeReranker, cache_bytes: int | None, cut: dict[str, object]
) -> None:
    """Whatever the cache of prefix states holds; with shared, repeated and missing passages."""
    lists = [PASSAGES, PASSAGES[::-1], [], [*PASSAGES[:2], *PASSAGES[:2]], PASSAGES[3:]]
    reranker = make_reranker(prefix_cache_bytes=cache_bytes, score_batch_size=4)
    check_like_rank(reranker, make_reranker(prefix_cache_bytes=0), lists, **cut)
    assert reranker.stats.passages_encoded == len(PASSAGES)


def test_many_queries_compute_each_prefix_once_even_in_a_small_cache(make_reranker: MakeReranker) -> None:
    sizes = n_bytes_each(make_reranker, PASSAGES)
    reranker = make_reranker(prefix_cache_bytes=2 * max(sizes), score_batch_size=2)
    reranker.rank_many(QUERIES, [PASSAGES] * len(QUERIES))
    assert reranker.stats.prefix_misses == len(PASSAGES)


def test_many_queries_in_slices(make_reranker: MakeReranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """More passages than are worked on at a time change nothing, nor does one list that is longer by itself."""
    monkeypatch.setattr("kalm_integrations.core.ranker.MAX_PASSAGES_AT_ONCE", 5)
    lists = [PASSAGES[:2], PASSAGES[2:4], PASSAGES, [], PASSAGES[:1]]
    check_like_rank(make_reranker(), make_reranker(prefix_cache_bytes=0), lists)


def test_what_rank_many_refuses(make_reranker: MakeReranker) -> None:
    reranker = make_reranker()
    assert reranker.rank_many([], []) == []
    assert reranker.rank_many(["a", "b"], [[], []]) == [[], []]
    assert reranker.stats.passages_scored == 0
    with pytest.raises(SettingsError, match="2 queries and 1 lists"):
        reranker.rank_many(["a", "b"], [["x"]])
    with pytest.raises(SettingsError, match="queries must be a list"):
        reranker.rank_many("a", [["x"]])
    with pytest.raises(SettingsError, match="passages must be a list"):
        reranker.rank_many(["a"], ["x"])
    with pytest.raises(SettingsError, match="query must be a string"):
        reranker.rank_many([1], [["x"]])


def test_states_on_disk_serve_another_process_s_first_query(make_reranker: MakeReranker, tmp_path: Path) -> None:
    """What `prepare` keeps at ingest, a new reranker reads instead of computing; the scores are the same."""
    first = make_reranker(prefix_store=tmp_path / "prefixes")
    first.prepare(PASSAGES)
    assert first.stats.prefix_misses == len(PASSAGES)
    assert first.stats.passages_scored == 0
    second = make_reranker(prefix_store=tmp_path / "prefixes")
    expected = make_reranker(prefix_cache_bytes=0).score(SECOND, PASSAGES)
    assert second.score(SECOND, PASSAGES) == pytest.approx(expected, abs=1e-6)
    assert (second.stats.prefix_store_hits, second.stats.prefix_misses) == (len(PASSAGES), 0)
    assert second.score(FIRST, PASSAGES) == pytest.approx(make_reranker().score(FIRST, PASSAGES), abs=1e-6)
    assert second.stats.prefix_hits == len(PASSAGES), "once read, they are in memory"


def test_a_store_works_without_memory_and_prepares_once(make_reranker: MakeReranker) -> None:
    store: dict[str, bytes] = {}
    reranker = make_reranker(prefix_store=store, prefix_cache_bytes=0, prefix_dtype="float16")
    reranker.prepare(PASSAGES, instruction="Find the team.")
    kept = dict(store)
    reranker.prepare(PASSAGES, instruction="Find the team.")
    assert store == kept
    assert reranker.stats.prefix_misses == len(PASSAGES)
    scores = reranker.score(FIRST, PASSAGES, "Find the team.")
    assert scores == pytest.approx(make_reranker().score(FIRST, PASSAGES, "Find the team."), abs=2e-3)
    assert reranker.stats.prefix_store_hits == 2 * len(PASSAGES)


def test_a_store_keeps_runs_of_different_precision_apart(make_reranker: MakeReranker) -> None:
    """States that bfloat16 computed are no answer to a float32 run, even if both keep float32."""
    store: dict[str, bytes] = {}
    reranker = make_reranker(prefix_store=store)
    encodings = reranker.encode_passages(PASSAGES)
    make_reranker(prefix_store=store, dtype="bfloat16", prefix_dtype="float32").prepare(encodings)
    expected = make_reranker(prefix_cache_bytes=0).score(FIRST, encodings)
    assert reranker.score(FIRST, encodings) == pytest.approx(expected, abs=1e-6)
    assert reranker.stats.prefix_store_hits == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda value: b"",
        lambda value: value[:-1],
        lambda value: value[:-1] + bytes([value[-1] ^ 1]),
        lambda value: value[:50] + bytes([value[50] ^ 1]) + value[51:],
        lambda value: bytes([value[0] ^ 1]) + value[1:],
        lambda value: value + b"x",
        lambda value: bytes(len(value)),
        bytearray,
        memoryview,
        lambda value: value.decode("latin-1"),
        lambda value: list(value[:10]),
        lambda value: 5,
        lambda value: forged(value, math.nan),
        lambda value: forged(value, -math.inf),
        lambda value: forged(value, 1e30),
    ],
)
def test_what_is_not_the_states_that_were_kept_is_computed_again(
    make_reranker: MakeReranker, damage: Callable[[bytes], object], caplog: pytest.LogCaptureFixture
) -> None:
    """It is no error and no wrong score; it is counted, logged once, and replaced."""
    store: dict[str, bytes] = {}
    make_reranker(prefix_store=store).prepare(PASSAGES)
    valid = dict(store)
    store.update({key: damage(value) for key, value in store.items()})
    reranker = make_reranker(prefix_store=store)
    expected = make_reranker(prefix_cache_bytes=0).score(FIRST, PASSAGES)
    assert reranker.score(FIRST, PASSAGES) == pytest.approx(expected, abs=1e-6)
    stats = reranker.stats
    # What is no bytes is the store's fault, which is counted as such.
    assert stats.prefix_misses == stats.prefix_corrupt + stats.store_failures == len(PASSAGES)
    assert stats.store_failures in (0, len(PASSAGES))
    assert store == valid
    logged = "it must hold bytes" if stats.store_failures else "stored prefix states are damaged"
    assert caplog.text.count(logged) == 1


def forged(value: bytes, number: float) -> bytes:
    """Return a value of the same key with a right checksum that holds a number somewhere."""
    name = value[: value.index(b":") + 33].decode()
    start = len(prefixes._head(b"", name))
    pairs = torch.frombuffer(bytearray(value[start:]), dtype=torch.float32)
    pairs[7] = number
    return prefixes._dump(PrefixStates(0, pairs), name)


def test_states_of_another_passage_are_refused(make_reranker: MakeReranker) -> None:
    """Two values of like length change places in the store: each belongs to its key."""
    store: dict[str, bytes] = {}
    texts = ["Otters eat fish.", "Otters eat crab."]
    make_reranker(prefix_store=store).prepare(texts)
    (first, one), (second, other) = store.items()
    assert len(one) == len(other)
    store.update({first: other, second: one})
    reranker = make_reranker(prefix_store=store)
    expected = make_reranker(prefix_cache_bytes=0).score(FIRST, texts)
    assert expected[0] != pytest.approx(expected[1], abs=1e-4)
    assert reranker.score(FIRST, texts) == pytest.approx(expected, abs=1e-6)
    assert (reranker.stats.prefix_store_hits, reranker.stats.prefix_corrupt) == (0, 2)
    assert list(store.values()) == [one, other], "and replaced"


def with_checksum_of(states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return states with the CRC-32 of others: 40 of their lowest bits are chosen for it, by elimination."""
    data, wanted = bytearray(states.numpy().tobytes()), zlib.crc32(target.numpy().tobytes())
    start = zlib.crc32(data)
    basis: dict[int, tuple[int, int]] = {}
    bits = [(4 * number, bit) for number in range(10) for bit in range(4)]
    for index, (position, bit) in enumerate(bits):
        changed = data.copy()
        changed[position] ^= 1 << bit
        effect, used = zlib.crc32(changed) ^ start, 1 << index
        while effect and effect.bit_length() in basis:
            base, base_used = basis[effect.bit_length()]
            effect, used = effect ^ base, used ^ base_used
        if effect:
            basis[effect.bit_length()] = effect, used
    difference, chosen = start ^ wanted, 0
    while difference:
        base, base_used = basis[difference.bit_length()]
        difference, chosen = difference ^ base, chosen ^ base_used
    for index, (position, bit) in enumerate(bits):
        data[position] ^= (chosen >> index & 1) << bit
    return torch.frombuffer(data, dtype=torch.float32).view(states.shape)


@pytest.mark.parametrize("as_string", [True, False])
def test_a_forged_encoding_changes_nobody_elses_score(make_reranker: MakeReranker, as_string: bool) -> None:
    """Its states have the CRC-32 of the honest ones; once they were kept under the same key."""
    server = make_reranker(prefix_store={}, storage_codec="fp32")
    text, honest = PASSAGES[0], server.encode_passages(PASSAGES[:1])[0]
    other = server.encode_passages([PASSAGES[1]])[0].states
    states = with_checksum_of(other[:1].repeat(len(honest.states), 1), honest.states)
    assert zlib.crc32(states.numpy().tobytes()) == zlib.crc32(honest.states.numpy().tobytes())
    lie, truth = replace(honest, states=states), honest

    def given(encoding: EncodedPassage) -> Passage | EncodedPassage:
        return Passage(text, encoding.to_metadata()) if as_string else encoding

    [expected] = make_reranker(prefix_cache_bytes=0).score(FIRST, [truth])
    [of_lie] = server.score(FIRST, [given(lie)])
    assert of_lie != pytest.approx(expected, abs=1e-3)
    assert server.score(FIRST, [given(truth)]) == pytest.approx([expected], abs=1e-6)
    another = make_reranker(prefix_store=server._ranker.scorer._prefix_store)
    assert another.score(FIRST, [given(truth)]) == pytest.approx([expected], abs=1e-6)
    assert another.stats.prefix_store_hits == 1, "the honest states, which are there by now"


def test_states_of_another_decoder_are_not_used(tmp_path: Path) -> None:
    """Weights, tokenizer and encoder are the same, so encodings are shared; the decoder's window is another."""
    store: dict[str, bytes] = {}
    folder = make_checkpoint(tmp_path / "one")
    shutil.copytree(folder, tmp_path / "two")
    config = json.loads((folder / "config.json").read_text())
    config["decoder"]["sliding_window"] = 3
    (tmp_path / "two" / "config.json").write_text(json.dumps(config))
    one = KalmReranker.from_pretrained(folder, prefix_store=store)
    two = KalmReranker.from_pretrained(tmp_path / "two", prefix_store=store)
    assert one.fingerprint == two.fingerprint
    one.prepare(PASSAGES)
    expected = KalmReranker.from_pretrained(tmp_path / "two", prefix_cache_bytes=0).score(FIRST, PASSAGES)
    assert two.score(FIRST, PASSAGES) == pytest.approx(expected, abs=1e-6)
    assert (two.stats.prefix_store_hits, two.stats.prefix_misses) == (0, len(PASSAGES))


def test_prefix_states_are_found_by_what_a_string_carries(make_reranker: MakeReranker) -> None:
    """Its checksum names the states: no query hashes the states of what it reads, pooled ones neither."""
    reranker = make_reranker(compression_ratio=8)
    fine = make_reranker(compression_ratio=4)
    values = [m["kalm_encoding"] for m in fine.encode_to_metadata(PASSAGES)]
    passages = [Passage(text, value) for text, value in zip(PASSAGES, values, strict=True)]
    for value, encoding in zip(values, map(EncodedPassage.from_metadata, values), strict=True):
        header = plain_format.read_base64(value.split(".")[1]).decode()
        assert f'"x":"{encoding.digest}"' in header
        assert encoding.pool(8).digest == encoding.digest
        assert replace(encoding, states=encoding.states + 1).digest not in (encoding.digest, replace(encoding).digest)
        assert replace(encoding).digest == replace(encoding, states=encoding.states.clone()).digest
    reranker.score(FIRST, passages)
    reranker.score(SECOND, passages)
    assert (reranker.stats.prefix_hits, reranker.stats.prefix_misses) == (len(PASSAGES), len(PASSAGES))


def test_what_prepare_and_its_store_refuse(make_reranker: MakeReranker, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"prefix_store must be a mapping.*list"):
        make_reranker(prefix_store=[])
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"prefix_store.*is a file"):
        make_reranker(prefix_store=tmp_path / "file")
    with pytest.raises(SettingsError, match="prefix_cache_bytes is 0"):
        make_reranker(prefix_cache_bytes=0).prepare(PASSAGES)
    with pytest.raises(SettingsError, match="passages must be a list"):
        make_reranker().prepare("text")
    with pytest.raises(SettingsError, match="instruction"):
        make_reranker().prepare(PASSAGES, instruction=3)
