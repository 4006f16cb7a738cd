"""The codecs `rot4`, `rot3` and `rot2`: how much they lose, of which states, and that nothing around them changes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tools import plain_format

from kalm_integrations import EncodedPassage, KalmReranker, Passage
from kalm_integrations.core.passages import header, rotated
from kalm_integrations.core.passages.rotation import rotation_of
from kalm_integrations.core.sizes import PAYLOAD_BYTES
from kalm_integrations.errors import CorruptEncodingError, NonFiniteScoreError

# What Lloyd and Max's levels lose of a normal distribution, as a part of its deviation: the roots of .00950, .0345 and .1175.
LOSSES = {"rot4": 0.0975, "rot3": 0.1858, "rot2": 0.3427}
CODECS = sorted(LOSSES)
ODD_WIDTHS = [1, 3, 7, 129, 641]
COUNTS = [1, 2, 3, 4]


def encoding_of(codec: str, states: torch.Tensor) -> EncodedPassage:
    return EncodedPassage(states, len(states), 1, "0123456789abcdef" * 2, "fedcba9876543210" * 2, codec)


def normal(n_states: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_states, width, generator=torch.Generator().manual_seed(seed))


def with_outliers(n_states: int, width: int) -> torch.Tensor:
    """Return states as encoders make them: two channels are large, one always the same and one not."""
    states = normal(n_states, width)
    states[:, 0] += 100
    states[:, width // 2] *= 60
    return states


def read_back(codec: str, states: torch.Tensor) -> torch.Tensor:
    read = EncodedPassage.from_metadata(encoding_of(codec, states).to_metadata())
    assert read.codec == codec
    return read.states


def loss(codec: str, states: torch.Tensor) -> float:
    """Return the length of the error as a part of the length of the states."""
    return float((read_back(codec, states) - states).norm() / states.norm())


def bits(states: torch.Tensor) -> list[int]:
    """Return the states' bits as whole numbers: -0 is not 0 here."""
    return states.view(torch.int32).flatten().tolist()


# --- what is lost


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("n_states", [1, 2, 3, 20])
@pytest.mark.parametrize("make", [normal, with_outliers])
def test_no_more_is_lost_than_of_a_normal_distribution(make, n_states, codec):
    # The states' own scales give 1% back or take it, as the draws fall.
    assert loss(codec, make(n_states, 640)) < LOSSES[codec] * 1.02


@pytest.mark.parametrize("codec", CODECS)
def test_what_the_states_have_in_common_costs_next_to_nothing(codec):
    differences = normal(20, 640)
    states = differences + 10 * normal(1, 640, seed=1)
    # Without the mean it would be ten times as much.
    assert loss(codec, states) * states.norm() < LOSSES[codec] * 1.03 * differences.norm()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("width", ODD_WIDTHS)
@pytest.mark.parametrize("n_states", COUNTS)
def test_odd_widths(n_states, width, codec):
    states = normal(n_states, width)
    read = read_back(codec, states)
    assert read.shape == states.shape
    # A few values are no normal distribution; the columns that fill the block take their part of the error.
    assert loss(codec, states) < LOSSES[codec] * 1.5
    # A state without a mean is about as long as it was.
    if n_states < 3 and width >= 129:
        torch.testing.assert_close(read.norm(dim=1), states.norm(dim=1), rtol=0.08, atol=0)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("width", ODD_WIDTHS)
@pytest.mark.parametrize("n_states", COUNTS)
def test_constant_and_zero_states(n_states, width, codec):
    zeros = torch.zeros(n_states, width)
    assert torch.equal(read_back(codec, zeros), zeros)
    assert loss(codec, torch.full((n_states, width), 3.7)) < LOSSES[codec] * 1.5
    states = normal(n_states, width)
    states[-1] = 0
    assert loss(codec, torch.cat((states, normal(1, width, seed=1)))) < LOSSES[codec] * 1.5
    # Without a mean a state of zeros comes back as such.
    if n_states == 2:
        assert not read_back(codec, states)[-1].any()


# --- the string


@settings(deadline=None)
@given(codec=st.sampled_from(CODECS), n_states=st.integers(1, 40), width=st.integers(1, 1200))
def test_the_size_is_known_beforehand(codec, n_states, width):
    encoding = encoding_of(codec, normal(n_states, width))
    payload = plain_format.read_base64(encoding.to_metadata().split(".")[2])
    assert len(payload) == PAYLOAD_BYTES[codec](n_states, width)


@settings(deadline=None)
@given(codec=st.sampled_from(CODECS), n_states=st.integers(1, 12), width=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_what_was_read_is_written_as_it_was(codec, n_states, width, seed):
    fresh = encoding_of(codec, normal(n_states, width, seed))
    stored = fresh.as_stored()
    value = fresh.to_metadata()
    read = EncodedPassage.from_metadata(value)
    assert bits(read.states) == bits(stored.states) == bits(stored.as_stored().states) == bits(read.as_stored().states)
    assert read.to_metadata() == stored.to_metadata() == read.as_stored().to_metadata() == value


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("width", [1, 66, 129, 300])
@pytest.mark.parametrize("n_states", COUNTS)
def test_a_reader_in_plain_python_reads_the_same(n_states, width, codec):
    value = encoding_of(codec, with_outliers(n_states, width)).to_metadata()
    assert plain_format.read(value)[1] == EncodedPassage.from_metadata(value).states.tolist()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("n_states", [2, 3])
def test_any_changed_character_is_refused(n_states, codec):
    value = encoding_of(codec, normal(n_states, 5)).to_metadata()
    for place, character in enumerate(value):
        for other in {"A", "_", chr(ord(character) ^ 1), ""} - {character}:
            with pytest.raises(CorruptEncodingError):
                EncodedPassage.from_metadata(value[:place] + other + value[place + 1 :])


# --- values that do not fit


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), torch.finfo(torch.float32).max])
def test_what_is_not_finite_is_not_written(bad, codec):
    states = normal(3, 66)
    states[1, 2] = bad
    with pytest.raises(NonFiniteScoreError, match="must be finite"):
        encoding_of(codec, states).to_metadata()
    with pytest.raises(NonFiniteScoreError, match="must be finite"):
        encoding_of(codec, states).as_stored()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("huge", [32_769.0, -1e5, 1e30])
def test_huge_values_are_written_as_bf16(huge, codec):
    states = normal(3, 66)
    states[1, 2] = huge
    read = EncodedPassage.from_metadata(encoding_of(codec, states).to_metadata())
    assert read.codec == encoding_of(codec, states).as_stored().codec == "bf16"
    torch.testing.assert_close(read.states, states, rtol=2**-8, atol=0)


@pytest.mark.parametrize("codec", ["rot4", "rot3"])
def test_states_whose_scale_overflows_are_written_as_bf16_though_no_value_is_huge(codec):
    # One rotated value holds all, and the levels are far shorter than it.
    one = np.zeros((1, 128), np.float32)
    one[0, 0] = 1
    state = torch.from_numpy(rotation_of(128).undo(one))
    state *= rotated.LARGEST / state.abs().max()
    states = torch.cat((state, -state.expand(19, -1)))
    read = EncodedPassage.from_metadata(encoding_of(codec, states).to_metadata())
    assert read.codec == "bf16"
    torch.testing.assert_close(read.states, states, rtol=2**-8, atol=0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("scale", [b"\x00\x7c", b"\x00\xfc", b"\x01\x7c", b"\x00\x7e"])
def test_a_scale_that_is_not_finite_is_refused_and_warns_of_nothing(scale, codec):
    fields, _ = plain_format.read(encoding_of(codec, normal(3, 66)).to_metadata())
    del fields["x"]
    size = PAYLOAD_BYTES[codec](3, 66)
    for place in range(4):
        payload = b"\x00\x3c" * place + scale + b"\x00\x3c" * (3 - place) + bytes(size - 8)
        with pytest.raises(CorruptEncodingError, match="NaN, infinite"):
            EncodedPassage.from_metadata(plain_format.write_inline(fields, payload))


# --- what surrounds it


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "one thread": lambda: threads(1),
    "four threads": lambda: threads(4),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": float64_by_default,
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "NumPy raises": lambda: np.errstate(all="raise"),
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("codec", CODECS)
def test_surroundings_change_nothing(codec, surroundings):
    states = with_outliers(20, 640)
    value = encoding_of(codec, states).to_metadata()
    expected = bits(EncodedPassage.from_metadata(value).states)
    with SURROUNDINGS[surroundings]():
        read = EncodedPassage.from_metadata(value)
        assert encoding_of(codec, states).to_metadata() == value
    assert read.states.dtype == torch.float32
    assert bits(read.states) == expected


def test_threads_read_at_once_what_one_reads():
    # Each width makes its rotation anew: tables are shared between threads.
    values = [encoding_of(codec, normal(3, width)).to_metadata() for codec in CODECS for width in range(700, 720)]
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(EncodedPassage.from_metadata, values))
    assert [bits(read.states) for read in at_once] == [bits(EncodedPassage.from_metadata(v).states) for v in values]


def test_a_reader_older_than_the_codec_counts_it_as_corrupt_and_encodes_again(tiny_checkpoint, monkeypatch):
    text = "The Rhine rises in the Swiss Alps."
    [metadata] = KalmReranker.from_pretrained(tiny_checkpoint, storage_codec="rot4").encode_to_metadata([text])
    older = KalmReranker.from_pretrained(tiny_checkpoint, storage_codec="fp32", cache_bytes=0)
    right = older.score("where?", [text])
    known = {name: codec for name, codec in PAYLOAD_BYTES.items() if not name.startswith("rot")}
    monkeypatch.setattr(header, "PAYLOAD_BYTES", known)
    with pytest.raises(CorruptEncodingError, match="codec"):
        EncodedPassage.from_metadata(metadata["kalm_encoding"])
    assert older.score("where?", [Passage(text, metadata["kalm_encoding"])]) == right
    assert (older.stats.corrupt, older.stats.stale) == (1, 0)
