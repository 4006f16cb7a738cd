"""The metadata string: what goes in comes out, and what is not exactly that is refused."""

from __future__ import annotations

import json
import re
import string
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tools import plain_format
from tools.golden import GOLDEN, extended
from tools.paths import DOCS
from torch.utils._python_dispatch import TorchDispatchMode

from kalm_integrations import EncodedPassage, KalmReranker, Passage
from kalm_integrations.core.model.pooling import pool_states
from kalm_integrations.core.passages import encoding as encoding_module
from kalm_integrations.core.passages.codecs import CODECS, WRITERS
from kalm_integrations.core.passages.strings import hash_text
from kalm_integrations.core.passages.windows import Window
from kalm_integrations.core.settings import MAX_TOKENS
from kalm_integrations.core.sizes import n_pooled_states
from kalm_integrations.errors import (
    CorruptEncodingError,
    EncodingTooLargeError,
    KalmError,
    NonFiniteScoreError,
    SettingsError,
)

FINGERPRINT = "0123456789abcdef" * 2
CASES = json.loads(GOLDEN.read_text(encoding="utf-8"))
BASE64URL = string.ascii_letters + string.digits + "-_"

codecs = st.sampled_from(sorted(CODECS))
# NUL, a combining mark, an astral character and a lone surrogate are what stores and encoders stumble over.
characters = st.one_of(st.sampled_from(BASE64URL + ".+/= \n\x00é\u0301東😀\ud800"), st.characters())


def make_encoding(
    codec: str = "fp32", n_tokens: int = 10, ratio: int = 4, width: int = 6, seed: int = 0, scale: float = 1.0
) -> EncodedPassage:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(n_pooled_states(n_tokens, ratio), width, generator=generator) * scale
    return EncodedPassage(states, n_tokens, ratio, FINGERPRINT, hash_text("text"), codec)


def assert_same(read: EncodedPassage, expected: EncodedPassage) -> None:
    facts = ("n_tokens", "compression_ratio", "fingerprint", "text_hash")
    assert [getattr(read, fact) for fact in facts] == [getattr(expected, fact) for fact in facts]
    assert (read.states.shape, read.states.dtype) == (expected.states.shape, torch.float32)


def error_bound(codec: str, states: torch.Tensor) -> torch.Tensor:
    """Return how far a value may be off: half a step of the codec's grid, and fp16's where a scale is rounded to it.

    Of a rotated codec that is what the reader's limit rests on: a mean and a difference that are as long as they were.
    """
    smallest = 2.0**-25  # half a step of fp16's subnormal numbers
    if codec == "fp32":
        return torch.zeros_like(states)
    if codec in ("fp16", "bf16"):
        return states.abs() * 2.0 ** (-11 if codec == "fp16" else -8) + smallest
    if codec != "int8":
        return (4 * states.norm(dim=1).max() + len(states[0]) * smallest).expand_as(states)
    largest = states.abs().amax(1, keepdim=True)
    rounding = (largest / 127 * (1 + 2.0**-11) + smallest) / 2
    clipping = largest * 2.0**-11 + 127 * smallest
    return torch.maximum(rounding, clipping).expand_as(states) * (1 + 1e-5)


# --- round trip


@settings(deadline=None)
@given(
    codec=codecs,
    n_tokens=st.integers(1, 60),
    ratio=st.integers(1, 70),
    width=st.integers(1, 140),
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([0.0, 1e-7, 1e-3, 1.0, 50.0, 1e4]),
)
@example(codec="rot3", n_tokens=1, ratio=1, width=1, seed=0, scale=1.0)
@example(codec="rot4", n_tokens=5, ratio=2, width=129, seed=0, scale=1.0)
def test_round_trip_of_any_shape_stays_within_the_codecs_error(codec, n_tokens, ratio, width, seed, scale):
    encoding = make_encoding(codec, n_tokens, ratio, width, seed, scale)
    value = encoding.to_metadata()
    read = EncodedPassage.from_metadata(value)
    assert_same(read, encoding)
    assert bool(((read.states - encoding.states).abs() <= error_bound(read.codec, encoding.states)).all())
    assert value.isascii()
    assert encoding.metadata_length() == len(value)
    store: dict[str, bytes] = {}
    referenced = EncodedPassage.from_metadata(encoding.to_metadata(store), store)
    assert_same(referenced, encoding)
    assert torch.equal(referenced.states, read.states)


@pytest.mark.parametrize("codec", ["fp32", "fp16", "bf16"])
def test_what_a_codec_can_hold_comes_back_bit_by_bit(codec):
    # -0, the smallest subnormal and the largest number of each: equal bits, not only equal numbers.
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[codec]
    info = torch.finfo(dtype)
    states = torch.tensor([[-0.0, info.smallest_normal / 2, info.max, info.min, 1.0]]).to(dtype).float()
    encoding = EncodedPassage(states, 1, 1, FINGERPRINT, hash_text("text"), codec)
    read = EncodedPassage.from_metadata(encoding.to_metadata())
    assert read.codec == codec
    assert torch.equal(read.states.view(torch.int32), states.view(torch.int32))


@pytest.mark.parametrize(("codec", "value"), [("fp16", 65_520.0), ("int8", 8.4e6), ("rot4", 32_769.0), ("rot2", 1e30)])
def test_states_beyond_half_precision_are_written_as_bf16(codec, value):
    encoding = EncodedPassage(torch.tensor([[1.0, value]]), 1, 1, FINGERPRINT, hash_text("text"), codec)
    written = encoding.to_metadata()
    read = EncodedPassage.from_metadata(written)
    assert read.codec == "bf16"
    assert encoding.metadata_length() == len(written)
    torch.testing.assert_close(read.states, encoding.states, rtol=2**-8, atol=0)


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_no_reader_would_take_is_not_written(codec, bad):
    encoding = EncodedPassage(torch.tensor([[1.0, bad]]), 1, 1, FINGERPRINT, hash_text("text"), codec)
    with pytest.raises(NonFiniteScoreError, match="states must be finite"):
        encoding.to_metadata()


def test_a_value_longer_than_readers_accept_is_not_written(monkeypatch):
    encoding = make_encoding()
    monkeypatch.setattr(encoding_module, "MAX_VALUE_CHARS", len(encoding.to_metadata()) - 1)
    with pytest.raises(EncodingTooLargeError, match="payload_store"):
        encoding.to_metadata()
    store: dict[str, bytes] = {}
    assert_same(EncodedPassage.from_metadata(encoding.to_metadata(store), store), encoding)


# --- pooling


@settings(deadline=None)
@given(
    n_tokens=st.integers(1, 70),
    ratio=st.integers(1, 8),
    factors=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    width=st.integers(1, 9),
    seed=st.integers(0, 2**32),
)
@example(n_tokens=9, ratio=1, factors=[2, 4], width=3, seed=0)
def test_pooling_a_stored_encoding_equals_pooling_the_tokens(n_tokens, ratio, factors, width, seed):
    """Also through metadata, and in steps (2, then 8)."""
    tokens = torch.randn(1, n_tokens, width, generator=torch.Generator().manual_seed(seed))
    count = torch.tensor([n_tokens])
    states = pool_states(tokens, count, ratio)[0]
    encoding = EncodedPassage(states, n_tokens, ratio, FINGERPRINT, hash_text("text"), "fp32")
    for factor in factors:
        ratio *= factor
        encoding = EncodedPassage.from_metadata(encoding.pool(ratio).to_metadata())
        assert (encoding.compression_ratio, encoding.n_tokens) == (ratio, n_tokens)
        torch.testing.assert_close(encoding.states, pool_states(tokens, count, ratio)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ratio", [6, 2, 0, -4, 4.0, 8.0, True, "8", None, MAX_TOKENS * 2])
def test_pool_refuses_what_is_no_multiple_or_no_ratio(ratio):
    with pytest.raises(SettingsError, match="compression ratio must be"):
        make_encoding(ratio=4).pool(ratio)


def test_pool_leaves_the_encoding_as_it_was():
    encoding = make_encoding()
    before = encoding.states.clone()
    encoding.pool(8).states.zero_()
    assert (encoding.compression_ratio, torch.equal(encoding.states, before)) == (4, True)


# --- changed values


def changes(value: str) -> st.SearchStrategy[str]:
    """Strings that differ from `value` in one place."""
    position = st.integers(0, len(value) - 1)
    return st.one_of(
        st.builds(lambda i, c: value[:i] + c + value[i + 1 :], position, characters),
        st.builds(lambda i, c: value[:i] + c + value[i:], st.integers(0, len(value)), characters),
        st.builds(lambda i, j: value[: min(i, j)] + value[max(i, j) + 1 :], position, position),
        st.builds(lambda i: value[:i], position),
        st.builds(lambda i: value[i:], st.integers(1, len(value))),
        st.builds(lambda tail: value + tail, st.text(characters, min_size=1, max_size=5)),
        st.builds(lambda i: value[:i] + value[i : i + 2][::-1] + value[i + 2 :], position),
        st.builds(lambda i: value[:i] + value[i].swapcase() + value[i + 1 :], position),
    )


@settings(deadline=None, max_examples=300)
@given(data=st.data(), case=st.sampled_from(CASES), kind=st.sampled_from(["value", "reference"]))
def test_any_change_of_a_value_is_corrupt(data, case, kind):
    changed = data.draw(changes(case[kind]))
    assume(changed != case[kind])
    store = {key: bytes.fromhex(entry) for key, entry in case["store"].items()}
    with pytest.raises(CorruptEncodingError, match="encode the passage again"):
        EncodedPassage.from_metadata(changed, store)


@pytest.mark.parametrize("kind", ["value", "reference"])
def test_every_position_counts_for_every_character_of_the_alphabet(kind):
    """Exhaustive where hypothesis samples; the last character of a base64 text has bits that decode to nothing."""
    [case] = [case for case in CASES if case["codec"] == "int4" and len(case["read"][0]) == 3]
    value, store = case[kind], {key: bytes.fromhex(entry) for key, entry in case["store"].items()}
    for position, old in enumerate(value):
        for new in BASE64URL + ".+/=":
            if new != old:
                with pytest.raises(CorruptEncodingError):
                    EncodedPassage.from_metadata(value[:position] + new + value[position + 1 :], store)


@pytest.fixture(scope="module")
def stored(tiny_checkpoint: Path) -> tuple[KalmReranker, str, str, float]:
    """A reranker that has nothing in memory, a text, its stored encoding and its right score."""
    text = "The Panthers defense gave up just 308 points."
    reranker = KalmReranker.from_pretrained(tiny_checkpoint, compression_ratio=8, cache_bytes=0)
    [right] = KalmReranker.from_pretrained(tiny_checkpoint, compression_ratio=8).score("points?", [text])
    [metadata] = reranker.encode_to_metadata([text])
    return reranker, text, metadata["kalm_encoding"], right


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_changed_value_is_a_counted_miss_with_the_right_score(stored, data):
    reranker, text, value, right = stored
    changed = data.draw(changes(value))
    assume(changed != value)
    before = reranker.stats
    assert reranker.score("points?", [Passage(text, changed)]) == [right]
    after = reranker.stats
    counts = [getattr(after, name) - getattr(before, name) for name in ("corrupt", "cache_misses", "stale", "cache_hits")]
    # What names another fingerprint is not read any further, damaged or not.
    is_stale = counts[2] == 1
    assert counts == ([0, 1, 1, 0] if is_stale else [1, 1, 0, 0])
    assert not is_stale or plain_format.read_base64(changed.split(".")[1])[7:39] != reranker.fingerprint.encode()


# --- hostile values


def forged(codec: str = "fp16", payload: bytes = bytes(8), **fields: Any) -> str:
    """Return a value with a right checksum: n=3 tokens at ratio 2, two states of width 2, with some fields changed."""
    valid = {"fp": FINGERPRINT, "th": hash_text("text"), "n": 3, "r": 2, "s": [2, 2], "c": codec}
    return plain_format.write_inline({**valid, **fields}, payload)


def test_the_forger_makes_sound_values_if_nothing_is_changed():
    assert EncodedPassage.from_metadata(forged()).states.tolist() == [[0, 0], [0, 0]]


HOSTILE_FIELDS = [
    *({"n": n, "s": [-(-n // 2), 2]} for n in (10**9, 2**63, 10**300, -3, 0)),
    {"n": 10**9, "r": 1, "s": [10**9, 640]},
    {"n": MAX_TOKENS, "r": 1, "s": [MAX_TOKENS, MAX_TOKENS]},
    {"s": [2, 10**9]},
    {"s": [10**9, 2]},
    *({"s": shape} for shape in ([2, 0], [2, -2], [-2, 2], [2], [2, 2, 1], [], 4, "22", None, {"0": 2}, [[2], 2], [2, "2"])),
    *({"s": shape} for shape in ([2.0, 2], [2, 2.0], [True, 2], [2, True], [2, None], [2, float("nan")])),
    *({"n": n} for n in (True, 3.0, "3", None, [3], float("nan"), float("inf"))),
    *({"r": r} for r in (True, 2.0, 0, -2, 3, "2", None, 10**9)),
    *({"c": c} for c in ("", "fp64", "FP16", "fp16\n", 16, None, ["fp16"], True, {"fp16": 1}, "fp32", "int4", "bf16 ")),
    *(
        {key: bad}
        for key in ("fp", "th")
        for bad in ("", "0" * 31, "0" * 33, "G" * 32, "A" * 32, "0" * 32 + "\n", 0, None, "é" * 32)
    ),
    {"fp": "\u0660" * 32},
    {"extra": 1},
]


class _NoTensors(TorchDispatchMode):
    """Fails on the first tensor operation."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise AssertionError(function)


@pytest.mark.parametrize("fields", HOSTILE_FIELDS, ids=lambda fields: json.dumps(fields)[:60])
def test_a_hostile_header_is_refused_before_anything_is_allocated(fields):
    value = forged(**fields)
    tracemalloc.start()
    try:
        with _NoTensors(), pytest.raises(CorruptEncodingError):
            EncodedPassage.from_metadata(value)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("fields", [{"n": True}, {"r": True}, {"s": [True, 1]}, {"s": [1, True]}])
def test_true_is_not_one(fields):
    """The sizes agree with the payload, so that only the type is wrong; bool is an int to Python."""
    valid = {"n": 1, "r": 1, "s": [1, 1]}
    assert EncodedPassage.from_metadata(forged(payload=bytes(2), **valid)).n_tokens == 1
    with pytest.raises(CorruptEncodingError, match="whole numbers"):
        EncodedPassage.from_metadata(forged(payload=bytes(2), **{**valid, **fields}))


def test_a_reference_that_claims_too_much_is_refused_before_anything_is_allocated():
    fields = {"fp": FINGERPRINT, "th": hash_text("text"), "n": MAX_TOKENS, "r": 1, "s": [MAX_TOKENS, MAX_TOKENS], "c": "fp32"}
    value, store = plain_format.write_reference(fields, bytes(8))
    with _NoTensors(), pytest.raises(CorruptEncodingError, match="entry of"):
        EncodedPassage.from_metadata(value, store)


def raw(header: str | bytes, body: str = "AAAAAAAAAAA") -> str:
    data = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    return f"kalm1.{plain_format.write_base64(data)}.{body}"


SOUND_HEADER = plain_format.read_base64(forged().split(".")[1]).decode()


@pytest.mark.parametrize(
    "value",
    [
        "",
        ".",
        "kalm1",
        "kalm1.",
        "kalm1..",
        "kalm1r.",
        "kalm1r..",
        "kalm2." + forged().split(".", 1)[1],
        forged() + ".",
        forged().upper(),
        raw("[" * 700),
        raw('{"fp":' * 100),
        raw("null"),
        raw("[]"),
        raw('"kalm1"'),
        raw("NaN"),
        raw("1" * 700),
        raw("{}"),
        raw(b"\xff\xfe"),
        raw('{"fp": "\ud800"}'),
        raw(SOUND_HEADER.replace('"n":3', '"n":9,"n":3')),
        raw(SOUND_HEADER.replace('"n":3', '"n":3e0')),
        raw(SOUND_HEADER.replace('"n":3', '"n": 3')),
        raw(SOUND_HEADER.replace('"n":3', '"n":NaN')),
        raw(SOUND_HEADER.replace('"n":3,"r":2', '"r":2,"n":3')),
        raw(SOUND_HEADER.replace("fp16", "fp\\u0031\\u0036")),
        raw(SOUND_HEADER + " "),
        raw(SOUND_HEADER.encode("utf-16")),
        raw(SOUND_HEADER.encode("utf-8-sig")),
        raw(SOUND_HEADER.replace('"x"', '"y"')),
        raw(SOUND_HEADER[: SOUND_HEADER.index(',"x"')] + "}"),
        raw("{" + " " * 800 + "}"),
        "kalm1." + "A" * 10**6,
        "kalm1." + "A" * 10**6 + "." + "A" * 10**6,
        "." * 10**6,
        "\ud800",
    ],
    ids=lambda value: value[:40].encode("ascii", "backslashreplace").decode() + f"({len(value)})",
)
def test_strings_that_are_no_encoding_are_corrupt(value):
    with pytest.raises(CorruptEncodingError):
        EncodedPassage.from_metadata(value)


@pytest.mark.parametrize(
    "body",
    ["?" * 11, "AAAAAAAAAAé", "AAAAAAAAA\ud800A", "AAAAAAAAAAB", "AAAAAAAAAA=", "AAAA AAAAAA", "++++++++++8", "//////////8"],
)
@pytest.mark.filterwarnings("error")  # the decoder warns of '+' and '/', for every value
def test_a_payload_in_another_spelling_is_refused_even_with_its_own_checksum(body):
    """A forger can compute a checksum; only one spelling of a payload is read."""
    for payload in (bytes(8), b"\xfb\xef\xbe" * 2 + b"\xfb\xef", b"\xff" * 8, body.encode("utf-8", "surrogatepass")):
        fields = {"fp": FINGERPRINT, "th": hash_text("text"), "n": 3, "r": 2, "s": [2, 2], "c": "fp16"}
        with pytest.raises(CorruptEncodingError):
            EncodedPassage.from_metadata(f"kalm1.{plain_format.write_header(fields, payload)}.{body}")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("codec", sorted(CODECS))
def test_states_and_scales_that_are_not_finite_are_refused_with_a_right_checksum(codec, bad):
    size = CODECS[codec].n_bytes(2, 2)
    # Little-endian halves; bfloat16 and float32 have the infinite and the NaN pattern in their upper halves.
    dtype = torch.bfloat16 if codec in ("fp32", "bf16") else torch.float16
    number = torch.tensor(bad, dtype=dtype).view(1).view(torch.uint8).numpy().tobytes()
    payload = (b"\x00\x00" + number).ljust(size, b"\x01") if codec == "fp32" else number.ljust(size, b"\x01")
    with pytest.raises(CorruptEncodingError, match="finite"):
        EncodedPassage.from_metadata(forged(codec, payload))


@pytest.mark.parametrize("value", [None, b"kalm1.a.b", 1, 1.5, True, {}, [], ["kalm1"], object(), float("nan")])
def test_a_value_that_is_no_string_is_corrupt(value):
    with pytest.raises(CorruptEncodingError, match=f"be a string, but got {type(value).__name__}"):
        EncodedPassage.from_metadata(value)


def test_a_subclass_of_str_is_a_string():
    class ShortRepr(str):
        __slots__ = ()

        def __repr__(self) -> str:
            return "<kalm>"

    encoding = make_encoding()
    assert_same(EncodedPassage.from_metadata(ShortRepr(encoding.to_metadata())), encoding)


@settings(deadline=None)
@given(
    st.one_of(
        st.text(),
        st.text(BASE64URL + ".").map("kalm1.".__add__),
        st.binary(),
        st.none(),
        st.integers(),
        st.dictionaries(st.text(), st.text()),
    )
)
def test_anything_at_all_is_corrupt_and_nothing_else(value):
    with pytest.raises(CorruptEncodingError):
        EncodedPassage.from_metadata(value)


header_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=40), st.sampled_from([1, 2, 3])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)


@settings(deadline=None, max_examples=300)
@given(
    fields=st.dictionaries(st.sampled_from(["fp", "th", "n", "r", "s", "c"]), header_values, min_size=1),
    payload=st.binary(max_size=24),
)
def test_forged_headers_are_read_exactly_or_refused(fields, payload):
    value = forged(payload=payload, **fields)
    try:
        read = EncodedPassage.from_metadata(value)
    except CorruptEncodingError:
        return
    assert plain_format.read(value)[1] == read.states.tolist()


@pytest.mark.parametrize("value", [None, b"kalm1", 7, {"a": 1}, "", "kalm1.", forged(n=10**9), forged(payload=b"\xff" * 8)])
def test_the_query_path_never_raises_for_metadata(stored, value):
    reranker, text, _, right = stored
    assert reranker.score("points?", [Passage(text, value)]) == [right]
    assert reranker.find_unencoded([Passage(text, value)]) == [0]


# --- references


def reference_of(encoding: EncodedPassage) -> tuple[str, dict[str, bytes]]:
    store: dict[str, bytes] = {}
    return encoding.to_metadata(store), store


def test_a_reference_is_short_and_flat_whatever_the_payload():
    small, _ = reference_of(make_encoding(n_tokens=1))
    large, store = reference_of(make_encoding(n_tokens=1000, ratio=1, width=100))
    assert small.startswith("kalm1r.")
    assert max(len(small), len(large)) < 250
    [(key, entry)] = store.items()
    assert key == f"{FINGERPRINT}:{hash_text('text')}:1:fp32"
    assert len(entry) == 8 + 400_000


@settings(deadline=None)
@given(data=st.data(), codec=codecs)
def test_any_change_of_a_stored_payload_is_corrupt(data, codec):
    value, store = reference_of(make_encoding(codec))
    [(key, entry)] = store.items()
    position = data.draw(st.integers(0, len(entry) - 1))
    flipped = bytes([entry[position] ^ data.draw(st.integers(1, 255))])
    other = [entry[:position], entry + flipped, entry[:position] + flipped + entry[position + 1 :]]
    for changed in (*other, entry[:position] + entry[position + 1 :], b"", entry.hex(), None, bytearray(entry)):
        with pytest.raises(CorruptEncodingError):
            EncodedPassage.from_metadata(value, {key: changed})


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_a_reference_and_the_string_itself_have_one_digest(codec):
    """A reference's header covers no payload, so its digest is the entry's checksum; other states have another."""
    encoding = make_encoding(codec)
    value, store = reference_of(encoding)
    digest = EncodedPassage.from_metadata(value, store).digest
    assert digest == EncodedPassage.from_metadata(encoding.to_metadata()).digest
    _, store = reference_of(make_encoding(codec, seed=1))
    assert EncodedPassage.from_metadata(value, store).digest != digest


def test_the_digest_of_states_in_memory_covers_all_that_pooling_depends_on():
    """Pooled encodings keep the digest of what they were pooled from."""
    encoding = make_encoding(n_tokens=10, ratio=2)
    variants = [encoding, replace(encoding, n_tokens=9), replace(encoding, compression_ratio=1, n_tokens=5), encoding.pool(2)]
    digests = [variant.digest for variant in variants]
    assert digests[3] == digests[0]
    assert len(set(digests)) == 3
    assert variants[1].pool(4).digest == digests[1] != encoding.pool(4).digest == digests[0]


def test_a_reference_whose_payload_is_gone_is_corrupt():
    value, _ = reference_of(make_encoding())
    with pytest.raises(CorruptEncodingError, match="no payload_store was given"):
        EncodedPassage.from_metadata(value)
    with pytest.raises(CorruptEncodingError, match="does not have it"):
        EncodedPassage.from_metadata(value, {})


def test_a_payload_written_again_with_other_last_bits_does_not_break_older_references():
    """Devices and batches change the last bits; the reference of a text does not depend on them."""
    first, again = make_encoding(), make_encoding()
    again.states.add_(1e-6)
    store: dict[str, bytes] = {}
    older, newer = first.to_metadata(store), again.to_metadata(store)
    assert older == newer
    assert len(store) == 1
    assert torch.equal(EncodedPassage.from_metadata(older, store).states, again.states)


def test_payloads_of_other_ratios_and_codecs_do_not_overwrite_each_other():
    store: dict[str, bytes] = {}
    encodings = [make_encoding(codec).pool(ratio) for codec in WRITERS for ratio in (4, 8)]
    values = [encoding.to_metadata(store) for encoding in encodings]
    assert len(store) == len(encodings)
    for value, encoding in zip(values, encodings, strict=True):
        assert_same(EncodedPassage.from_metadata(value, store), encoding)


@pytest.mark.parametrize("codec", sorted(WRITERS))
def test_what_was_stored_is_written_as_it_was_also_at_its_own_ratio(codec):
    """A copy would be rounded a second time, and its string would hold other states than those that were scored."""
    stored = make_encoding(codec).as_stored()
    assert stored.pool(stored.compression_ratio).to_metadata() == stored.to_metadata() == make_encoding(codec).to_metadata()


@pytest.mark.parametrize("codec", sorted(WRITERS))
@pytest.mark.parametrize("limit", [1_500, 100_000])
def test_what_is_stored_within_a_limit_is_what_was_scored(tiny_checkpoint, codec, limit):
    settings = {"storage_codec": codec, "max_inline_bytes": limit}
    texts = ["The Rhine rises in the Swiss Alps. " * n for n in (1, 4, 20)]
    fresh = KalmReranker.from_pretrained(tiny_checkpoint, **settings)
    scores = fresh.score("rivers?", texts)
    rows = fresh.encode_to_metadata(texts)
    other = KalmReranker.from_pretrained(tiny_checkpoint, **settings)
    assert other.score("rivers?", [Passage(t, row["kalm_encoding"]) for t, row in zip(texts, rows, strict=True)]) == scores
    assert other.stats.passages_encoded == 0


# --- the promise


def windows_of(case: dict[str, Any]) -> tuple[Window, ...] | None:
    return tuple(Window(*window) for window in case["windows"]) if "windows" in case else None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["text"])
def test_golden_values_are_read_as_ever(case):
    store = {key: bytes.fromhex(entry) for key, entry in case["store"].items()}
    for value in (case["value"], case["reference"]):
        read = EncodedPassage.from_metadata(value, store)
        assert read.states.tolist() == case["read"]
        assert (read.n_tokens, read.compression_ratio) == (case["n_tokens"], case["compression_ratio"])
        assert (read.fingerprint, read.text_hash) == (FINGERPRINT, hash_text(f"<Document>: {case['text']}"))
        assert read.windows == windows_of(case)
        fields, states = plain_format.read(value, store)
        assert (states, fields.get("windows")) == (case["read"], case.get("windows"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["text"])
def test_golden_values_that_were_read_are_written_as_they_were(case):
    read = EncodedPassage.from_metadata(case["value"])
    store: dict[str, bytes] = {}
    assert (read.to_metadata(), read.to_metadata(store)) == (case["value"], case["reference"])
    assert {key: entry.hex() for key, entry in store.items()} == case["store"]


@pytest.mark.parametrize("case", [case for case in CASES if case["codec"] in WRITERS], ids=lambda case: case["text"])
def test_golden_values_are_still_written(case):
    text_hash = hash_text(f"<Document>: {case['text']}")
    facts = (case["n_tokens"], case["compression_ratio"], FINGERPRINT, text_hash, case["codec"], windows_of(case))
    encoding = EncodedPassage(torch.tensor(case["written"]), *facts)
    assert encoding.as_stored().states.tolist() == case["read"]
    # The page leaves it to writers how they choose levels and scales, so that only what is read is held fast.
    if not case["codec"].startswith("rot"):
        store: dict[str, bytes] = {}
        assert (encoding.to_metadata(), encoding.to_metadata(store)) == (case["value"], case["reference"])
        assert {key: entry.hex() for key, entry in store.items()} == case["store"]


def test_the_golden_file_has_all_that_its_maker_makes():
    assert extended(CASES) == CASES


def test_golden_file_has_every_codec():
    assert {case["codec"] for case in CASES} == set(CODECS)


def test_every_refusal_is_an_error_of_this_package():
    assert issubclass(CorruptEncodingError, KalmError)
    assert issubclass(CorruptEncodingError, ValueError)


def test_the_example_of_the_specification_is_right():
    page = (DOCS / "format.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\w+\n(.*?)\n```", page.split("## Example")[1], re.DOTALL)
    value, header, payload, states, reference, stored_entry = blocks
    key, entry = stored_entry.split()
    [golden] = [case for case in CASES if case["value"] == value]
    assert (reference, {key: entry}, json.loads(states)) == (golden["reference"], golden["store"], golden["read"])
    assert value == f"kalm1.{plain_format.write_base64(header.encode())}.{plain_format.write_base64(bytes.fromhex(payload))}"
    assert json.loads(header)["th"] == hash_text("<Document>: fp16 3")
