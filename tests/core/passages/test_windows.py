"""The table of windows in a passage's string: what goes in comes out, and what does not agree is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tools import plain_format

from kalm_integrations import EncodedPassage
from kalm_integrations.core.model.pooling import pool_states
from kalm_integrations.core.passages.codecs import CODECS
from kalm_integrations.core.passages.expected import Expected, is_current
from kalm_integrations.core.passages.strings import fingerprint_of, hash_text
from kalm_integrations.core.passages.windows import Window
from kalm_integrations.core.sizes import n_pooled_states
from kalm_integrations.errors import CorruptEncodingError, StaleEncodingError

FITTING, IN_WINDOWS = "0123456789abcdef" * 2, "fedcba9876543210" * 2
LIMIT = 8
EXPECTED = Expected(FITTING, 3, LIMIT, 1e6, IN_WINDOWS, 4)
WINDOWS = ((0, 40, 8), (31, 80, 7), (75, 90, 1))

token_counts = st.lists(st.integers(1, 30), min_size=1, max_size=6)


def make_encoding(tokens: list[int], ratio: int = 2, width: int = 3, codec: str = "fp32", seed: int = 0) -> EncodedPassage:
    n_states = sum(n_pooled_states(n, ratio) for n in tokens)
    states = torch.randn(n_states, width, generator=torch.Generator().manual_seed(seed))
    windows = tuple(Window(10 * index, 10 * index + 15, n) for index, n in enumerate(tokens))
    return EncodedPassage(states, sum(tokens), ratio, IN_WINDOWS, hash_text("text"), codec, windows)


def forged(windows: Any = WINDOWS, **fields: Any) -> str:
    """Return a value with a right checksum, of zeros in fp16 at ratio 2, with some fields changed."""
    n_states = sum(n_pooled_states(n, 2) for _, _, n in windows)
    n_tokens = sum(n for _, _, n in windows)
    valid = {"fp": IN_WINDOWS, "th": hash_text("text"), "n": n_tokens, "r": 2, "s": [n_states, 3], "c": "fp16"}
    payload = plain_format.write_table(windows) + bytes(2 * n_states * 3)
    return plain_format.write_inline({**valid, "w": len(windows), **fields}, payload)


@settings(deadline=None)
@given(tokens=token_counts, ratio=st.integers(1, 9), codec=st.sampled_from(sorted(CODECS)), seed=st.integers(0, 99))
def test_any_windows_come_back_as_string_as_reference_and_by_their_text(tokens, ratio, codec, seed):
    encoding = make_encoding(tokens, ratio, codec=codec, seed=seed).as_stored()
    value = encoding.to_metadata()
    assert encoding.metadata_length() == len(value)
    assert fingerprint_of(value) == IN_WINDOWS
    store: dict[str, bytes] = {}
    reference = encoding.to_metadata(store)
    expected = Expected(FITTING, 3, 30, 1e6, IN_WINDOWS, 6)
    [entry] = store.values()
    by_text = EncodedPassage.from_payload(entry, IN_WINDOWS, encoding.text_hash, ratio, encoding.codec, expected)
    for read in (EncodedPassage.from_metadata(value), EncodedPassage.from_metadata(reference, store, expected), by_text):
        assert (read.windows, read.n_tokens, read.digest) == (encoding.windows, sum(tokens), encoding.digest)
        assert torch.equal(read.states, encoding.states)
        assert [len(states) for states in read.window_states] == [n_pooled_states(n, ratio) for n in tokens]
    fields, states = plain_format.read(reference, store)
    assert states == encoding.states.tolist()
    assert fields["windows"] == [list(window) for window in encoding.windows or ()]


@settings(deadline=None)
@given(tokens=token_counts, ratio=st.integers(1, 4), factor=st.integers(1, 5), seed=st.integers(0, 99))
def test_each_window_is_pooled_on_its_own(tokens, ratio, factor, seed):
    generator = torch.Generator().manual_seed(seed)
    all_tokens = [torch.randn(1, n, 3, generator=generator) for n in tokens]
    made = [[pool_states(each, torch.tensor([each.shape[1]]), r)[0] for each in all_tokens] for r in (ratio, ratio * factor)]
    encoding = replace(make_encoding(tokens, ratio), states=torch.cat(made[0]))
    pooled = EncodedPassage.from_metadata(encoding.pool(ratio * factor).to_metadata())
    torch.testing.assert_close(pooled.states, torch.cat(made[1]), rtol=1e-5, atol=1e-6)
    assert pooled.windows == encoding.windows


def test_the_forger_makes_sound_values_if_nothing_is_changed():
    read = EncodedPassage.from_metadata(forged(), expected=EXPECTED)
    assert read.windows == WINDOWS


@pytest.mark.parametrize(
    "value",
    [
        forged(w=0),
        forged(w=2),
        forged(w=4),
        forged(w=True),
        forged(w="3"),
        forged(w=2**40),
        forged(n=15),
        forged(n=17),
        forged(s=[8, 3]),
        forged(s=[10, 3]),
        forged([(0, 40, 8), (0, 80, 7), (75, 90, 1)]),
        forged([(0, 40, 8), (31, 40, 7), (75, 90, 1)]),
        forged([(0, 40, 8), (31, 31, 7), (75, 90, 1)]),
        forged([(40, 0, 8), (41, 80, 7), (75, 90, 1)]),
        forged([(0, 40, 8), (31, 80, 8), (75, 90, 0)], s=[9, 3]),
        # The count in front of the table is not the header's.
        plain_format.write_inline(
            {"fp": IN_WINDOWS, "th": hash_text("text"), "n": 1, "r": 2, "s": [1, 3], "c": "fp16", "w": 1},
            b"\2" + plain_format.write_table([(0, 5, 1)])[1:] + bytes(6),
        ),
    ],
)
def test_windows_that_no_encoder_makes_are_corrupt(value):
    with pytest.raises(CorruptEncodingError, match="encode the passage again"):
        EncodedPassage.from_metadata(value)


@pytest.mark.parametrize("windows", [((0, 40, 9),), tuple((i, i + 2, 1) for i in range(5))])
def test_more_than_the_settings_allow_is_corrupt(windows):
    value = forged(windows)
    assert EncodedPassage.from_metadata(value).windows == windows
    with pytest.raises(CorruptEncodingError, match=r"max_passage_tokens=8|max_windows=4"):
        EncodedPassage.from_metadata(value, expected=EXPECTED)


@pytest.mark.parametrize("entry", [b"", bytes(8), bytes(12), b"\xff" * 40, bytes(8) + plain_format.write_table([(0, 9, 3)])])
def test_an_entry_that_holds_no_windows_is_corrupt(entry):
    with pytest.raises(CorruptEncodingError):
        EncodedPassage.from_payload(entry, IN_WINDOWS, hash_text("text"), 2, "fp16", EXPECTED)


def test_what_may_have_been_cut_and_what_another_setting_made_is_stale():
    full = replace(make_encoding([LIMIT]), fingerprint=FITTING, windows=None)
    short = EncodedPassage(full.states[:3], 6, 2, FITTING, full.text_hash, "fp32")
    cutting = Expected(FITTING, 3, LIMIT, 1e6)
    in_windows = make_encoding([LIMIT, 3])
    for expected, stale, sound in ((EXPECTED, full, (short, in_windows)), (cutting, in_windows, (short, full))):
        for encoding in sound:
            assert EncodedPassage.from_metadata(encoding.to_metadata(), expected=expected).windows == encoding.windows
        with pytest.raises(StaleEncodingError, match="encode the text again"):
            EncodedPassage.from_metadata(stale.to_metadata(), expected=expected)
    forged_fitting = replace(in_windows, fingerprint=FITTING)
    with pytest.raises(StaleEncodingError, match="must be in windows"):
        EncodedPassage.from_metadata(forged_fitting.to_metadata(), expected=EXPECTED)


def test_who_does_not_know_the_limit_takes_no_encoding_for_whole():
    fields = {"fp": FITTING, "n": 1}
    assert is_current(fields, FITTING, None, None)
    assert not is_current(fields, FITTING, IN_WINDOWS, None)
