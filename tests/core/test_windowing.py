"""Where windows begin and end: at sentences, with all of the text, and with no more work than is allowed."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kalm_integrations import KalmReranker
from kalm_integrations.core.checkpoint.prompts import passage_text
from kalm_integrations.core.checkpoint.tokenization import PromptTokenizer
from kalm_integrations.core.text import without_surrogates
from kalm_integrations.core.windowing import InWindows, Windower
from kalm_integrations.samples import XQUAD_EN

LIMIT = 64
# What tokenizers and rules for sentences stumble over.
PIECES = [
    *("a", "e\u0301", "👩‍👩‍👧‍👦", " ", " " * 60, "\n\n", "ﷺ", "字", "ก็", "x" * 40, "0123456789", "One. Two! "),
    *("\ud83d\ude00", "\ud83d", "<end_of_turn>", "\t" * 20, "\x00", "\u200b" * 30, "한국어 "),
]


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return KalmReranker.from_pretrained("pico").runtime.tokenizer(allow_special_tokens=False)


@pytest.fixture(scope="module")
def prose() -> str:
    rows = (XQUAD_EN / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    return " ".join(json.loads(row)["text"] for row in rows)


def check(tokenizer: PromptTokenizer, text: str, found: InWindows, limit: int, most: int) -> None:
    """Check what holds of every text."""
    text = without_surrogates(text)
    length = len(text.rstrip()) or len(text)
    windows = found.windows
    assert 1 <= len(windows) <= most
    assert windows[0].start == 0
    for window, following in pairwise(windows):
        assert window.start < following.start <= window.end < following.end
    assert found.is_whole == (windows[-1].end >= length)
    assert found.is_whole or len(windows) == most
    for window, ids in zip(windows, found.token_ids, strict=True):
        assert window.n_tokens == len(ids) <= limit
        assert tokenizer.passages([passage_text(text[window.start : window.end])])[0] == ids


@settings(deadline=None, max_examples=150)
@given(
    pieces=st.lists(st.tuples(st.sampled_from(PIECES), st.integers(1, 40)), min_size=1, max_size=30),
    limit=st.sampled_from([LIMIT, 65, 100]),
    most=st.sampled_from([1, 3, 64]),
)
@example(pieces=[("ﷺ", 200)], limit=LIMIT, most=3)
@example(pieces=[("a", 5000)], limit=LIMIT, most=64)
@example(pieces=[(" ", 5000)], limit=LIMIT, most=64)
# What is repeated takes as many tokens as a window holds.
@example(pieces=[(" " * 60, 29), ("e\u0301", 29), ("ﷺ", 30)], limit=LIMIT, most=64)
def test_windows_hold_all_of_any_text(tokenizer, pieces, limit, most):
    text = "".join(piece * n for piece, n in pieces)
    check(tokenizer, text, Windower(tokenizer, limit, most).divide(text), limit, most)


def test_windows_of_prose_begin_and_end_with_sentences(tokenizer, prose):
    limit = 512
    found = Windower(tokenizer, limit, 1000).divide(prose)
    check(tokenizer, prose, found, limit, 1000)
    inner = found.windows[:-1]
    assert len(inner) > 50
    # A sentence ends in the last tenth of nearly every window of this length.
    at_sentences = [prose[window.end - 2 : window.end].strip().endswith((".", "?", "!", '"', ")")) for window in inner]
    assert sum(at_sentences) > 0.8 * len(inner)
    assert all(prose[window.end].isspace() or prose[window.end - 1].isspace() for window in inner)
    for window, following in pairwise(found.windows):
        shared = prose[following.start : window.end]
        n_shared = len(tokenizer.passages([shared])[0])
        assert n_shared <= limit // 8 + 2
    assert all(window.n_tokens >= 0.9 * limit - 1 for window in inner)
    # They repeat a sentence where one fits into an eighth of a window.
    assert sum(b.start < a.end for a, b in pairwise(found.windows)) > 0.9 * len(inner)


@pytest.mark.parametrize(
    "text",
    ["x" * 4_000_000, "字" * 2_000_000, "e" + "\u0301" * 2_000_000, "word " * 800_000, " " * 4_000_000 + "x"],
    ids=["letters", "no spaces", "marks", "words", "blanks"],
)
def test_a_huge_text_takes_no_more_than_its_windows(tokenizer, text, monkeypatch):
    read: list[int] = []
    encode = tokenizer._first._encode
    monkeypatch.setattr(tokenizer._first, "_encode", lambda texts: read.extend(map(len, texts)) or encode(texts))
    found = Windower(tokenizer, LIMIT, 4).divide(text)
    assert not found.is_whole
    # Blanks, which are no tokens, are looked at furthest.
    assert sum(read) < 400_000
    check(tokenizer, text, found, LIMIT, 4)
