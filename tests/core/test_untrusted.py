"""What a reranker takes from a store or from a caller is what its checkpoint's encoder can have made, or it is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tools import plain_format
from torch.utils._python_dispatch import TorchDispatchMode

from kalm_integrations import EncodedPassage, KalmReranker, Passage
from kalm_integrations.core.passages.codecs import CODECS
from kalm_integrations.core.settings import CODEC_NAMES
from kalm_integrations.errors import CorruptEncodingError, StaleEncodingError

MakeReranker = Callable[..., KalmReranker]

TEXTS = ["The Panthers defense gave up just 308 points.", "Lift and drag of a slender wing.", "naïve café 東京", "a", "b"]
QUERY = "who won the super bowl?"


@pytest.fixture
def reranker(make_reranker: MakeReranker) -> KalmReranker:
    return make_reranker(cache_bytes=0)


def stored(reranker: KalmReranker, texts: list[str]) -> list[Passage]:
    return [Passage(t, m["kalm_encoding"]) for t, m in zip(texts, reranker.encode_to_metadata(texts), strict=True)]


# --- what no encoder of the checkpoint can have made


def value_of(encoding: EncodedPassage, **fields: object) -> str:
    return replace(encoding, **fields).to_metadata()


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "rot4"])
@pytest.mark.parametrize("magnitude", [3e38, 1e19, 6e4, 1000.0])
def test_states_that_no_encoder_can_give_are_made_anew_and_fail_no_query(make_reranker, codec, magnitude):
    """They have a right checksum; the largest overflow in the decoder, and once took the whole query down."""
    reranker = make_reranker(cache_bytes=0)
    [honest] = reranker.encode_passages(TEXTS[:1])
    value = value_of(honest, states=torch.full_like(honest.states, magnitude), codec=codec)
    passages = [Passage(TEXTS[0], value), TEXTS[1]]
    assert list(reranker.read(passages)) == ["corrupt", "missing"]
    assert reranker.find_unencoded(passages[:1]) == [0]
    assert reranker.score(QUERY, passages) == make_reranker().score(QUERY, TEXTS[:2])
    assert reranker.stats.corrupt == 1


def test_one_value_beyond_the_bound_is_enough(reranker):
    [honest] = reranker.encode_passages(TEXTS[:1])
    limit = reranker._ranker.reader.expected.limit
    for feature in range(0, honest.states.shape[1], 7):
        for factor, status in ((0.999, "stored"), (1.001, "corrupt")):
            states = honest.states.clone()
            states[-1, feature] = -limit * factor
            assert list(reranker.read([Passage(TEXTS[0], value_of(honest, states=states, codec="fp32"))])) == [status]


@pytest.mark.parametrize("codec", CODEC_NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_encoder_gives_is_within_the_bound_whatever_the_codecs(make_reranker, codec, dtype):
    """The norm's bound holds for one state that has all its length in one feature; codecs may round it up, twice."""
    reranker = make_reranker(dtype=dtype, compression_ratio=1)
    [honest] = reranker.encode_passages(TEXTS[:1])
    bound = reranker.runtime.checkpoint.encoder_bound
    assert bool((honest.states.norm(dim=1) <= bound).all())
    extreme = replace(honest, states=torch.eye(*honest.states.shape) * bound)
    for encoding in (honest, extreme):
        for first in CODEC_NAMES:
            read = EncodedPassage.from_metadata(value_of(encoding, codec=first))
            assert list(reranker.read([Passage(TEXTS[0], value_of(read, codec=codec))])) == ["stored"]


def test_the_bound_is_found_without_loading_the_encoder(make_reranker, tiny_checkpoint, tmp_path):
    passages = stored(make_reranker(), TEXTS)
    shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    reader = make_reranker(tmp_path / "copy")
    assert reader.find_unencoded(passages) == []
    assert reader.runtime.loaded == ()
    weight = reader.runtime.stack("encoder").final_norm
    bound = len(weight) ** 0.5 * ((1 + weight).abs() + weight.abs() / 256).max().item()
    assert reader.runtime.checkpoint.encoder_bound == pytest.approx(bound)


def test_more_tokens_than_the_settings_allow_are_corrupt(make_reranker):
    reranker = make_reranker(max_passage_tokens=8, compression_ratio=1, cache_bytes=0)
    [honest] = reranker.encode_passages(TEXTS[:1])
    value = value_of(honest, n_tokens=9, states=honest.states[[*range(8), 7]])
    assert list(reranker.read([Passage(TEXTS[0], value), Passage(TEXTS[0], value_of(honest))])) == ["corrupt", "stored"]


class Tensorless(TorchDispatchMode):
    """Fails on the first tensor operation."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise AssertionError(function)


@pytest.mark.parametrize("kind", ["inline", "reference"])
@pytest.mark.parametrize("fields", [{"fp": "0" * 32}, {"s": [3, 100_000]}])
def test_another_fingerprint_or_width_is_refused_by_the_header(make_reranker, kind, fields):
    """Its payload, of which there may be gigabytes, is neither fetched nor decoded; damage in it does not matter."""
    store: dict[str, bytes] = {}
    reranker = make_reranker(payload_store=store, cache_bytes=0)
    assert reranker.find_unencoded(stored(reranker, TEXTS[:1])) == []
    header = {"fp": reranker.fingerprint, "th": reranker._ranker.reader.key("a"), "n": 3, "r": 1, "s": [3, 48], "c": "rot4"}
    header.update(fields)
    payload = bytes(CODECS["rot4"].n_bytes(*header["s"]))
    if kind == "inline":
        value = plain_format.write_inline(header, payload)
        value = value[:-8] + "+" * 8
    else:
        value, _ = plain_format.write_reference(header, payload)
    with Tensorless():
        assert list(reranker._ranker.reader.read([Passage("a", value)])) == ["stale"]
    assert reranker.score(QUERY, [Passage("a", value)]) == make_reranker().score(QUERY, ["a"])
    assert (reranker.stats.stale, reranker.stats.corrupt) == (1, 0)


STATES = torch.ones(2, 48)
ODD_FIELDS = [
    ({"states": torch.full((2, 48), float("nan"))}, CorruptEncodingError, "finite"),
    ({"states": torch.full((2, 48), -float("inf"))}, CorruptEncodingError, "finite"),
    ({"states": torch.full((2, 48), 1e30)}, CorruptEncodingError, "too large"),
    ({"states": torch.ones(2, 47)}, StaleEncodingError, "width 48, but has .* and 47"),
    ({"states": torch.ones(2, 0)}, CorruptEncodingError, "width, but has 5, 4 and 0"),
    ({"states": torch.ones(0, 48)}, CorruptEncodingError, "is 2, but has 0"),
    ({"states": torch.ones(3, 48)}, CorruptEncodingError, "2, but has 3"),
    ({"states": torch.ones(1, 1).expand(10**9, 48)}, CorruptEncodingError, "2, but has 1000000000"),
    *(
        ({"states": states}, CorruptEncodingError, "float32 tensor on the CPU of shape")
        for states in (
            STATES[None],
            STATES[0],
            STATES.double(),
            STATES.half(),
            STATES.int(),
            STATES.to_sparse(),
            STATES.to("meta"),
            STATES.numpy(),
            STATES.tolist(),
            None,
            "states",
        )
    ),
    *(({"n_tokens": n}, CorruptEncodingError, "whole numbers") for n in (0, -1, 5.0, "5", None, True, 10**30)),
    *(({"compression_ratio": r}, CorruptEncodingError, "whole numbers") for r in (0, -4, 4.0, None, [4], 10**30)),
    ({"n_tokens": 1025, "states": torch.ones(257, 48)}, CorruptEncodingError, "max_passage_tokens=1024"),
    ({"n_tokens": 2**17, "compression_ratio": 1, "states": torch.ones(1, 1).expand(2**17, 48)}, CorruptEncodingError, "max_"),
    ({"fingerprint": "0" * 32}, StaleEncodingError, "fingerprint"),
    *(({"fingerprint": f}, CorruptEncodingError, "fingerprint") for f in ("", None, b"x", [])),
    *(({"text_hash": t}, CorruptEncodingError, "text_hash") for t in (None, b"x", 5, {})),
    *(({"codec": c}, CorruptEncodingError, "codec") for c in ("fp64", None, 5, [])),
]


@pytest.mark.parametrize(("fields", "error", "message"), ODD_FIELDS)
def test_an_odd_encoding_given_as_an_object_is_a_typed_error(reranker, fields, error, message):
    valid = EncodedPassage(STATES, 5, 4, reranker.fingerprint, "0" * 32, "fp32")
    assert len(reranker.score(QUERY, [valid])) == 1
    for use in (reranker.read, lambda passages: reranker.score(QUERY, ["a", *passages]), reranker.prepare):
        with pytest.raises(error, match=message):
            use([replace(valid, **fields)])


def test_sound_states_may_come_in_any_layout_and_with_gradients(reranker):
    [encoding] = reranker.encode_passages(TEXTS[:1])
    expected = reranker.score(QUERY, [encoding])
    for states in (encoding.states.t().contiguous().t(), encoding.states.clone().requires_grad_()):
        same = replace(encoding, states=states)
        assert reranker.score(QUERY, [same]) == expected
        assert same.digest == replace(encoding).digest


# --- one text, one hash


@pytest.mark.parametrize("text", ["the angle \ud835\udf03", "half \ud835", "\udf03\ud835 halves", "\ud83d\ude00 \ud800 😀"])
def test_what_json_does_to_a_text_leaves_its_encoding_valid(reranker, text):
    [metadata] = reranker.encode_to_metadata([text])
    for row in (
        json.loads(json.dumps({"text": text}))["text"],
        text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
    ):
        assert reranker.read([Passage(row, metadata["kalm_encoding"])])[0] == "stored"
        assert reranker.score(QUERY, [row]) == reranker.score(QUERY, [text])
