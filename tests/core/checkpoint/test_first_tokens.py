"""A text costs what its first tokens cost, and these are those of the whole text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Encoding, Tokenizer
from tools import gemma

import kalm_integrations
from kalm_integrations import KalmReranker
from kalm_integrations.core.checkpoint.first_tokens import FirstTokens
from kalm_integrations.errors import SettingsError

PICO = Path(kalm_integrations.__file__).parent / "checkpoints" / "pico"

# What joins, expands, is dropped, or depends on its neighbours in some tokenizer.
PIECES = [
    *(
        "the",
        "Theory ",
        "won't",
        "2015",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "a",
        "ab",
        "ba",
        "1",
        "=-",
        "><",
        "</td>",
        "▁",
        " a",
    ),
    *(
        "東京タワー",
        "字",
        "。",
        "é",
        "e\u0301",
        "\u0301\u0316",
        "\u3099",
        "\uff9e",
        "\ufdfa",
        "ﬁ",
        "Ω",
        "가",
        "\u1100",
        "\u1161",
        "\u11a8",
    ),
    *("🎉", "👩\u200d👧", "\ud83c\udf89", "\ud83c", "ก็", "Panthers", "<end_of_turn>", "?", "...", "\x00"),
]
pieces = st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
long_texts = st.builds(
    lambda start, repeated, times, end: start + repeated * (times // len(repeated) + 1) + end,
    st.lists(pieces, max_size=8).map("".join),
    st.lists(pieces, min_size=1, max_size=8).map("".join),
    st.sampled_from([10, 520, 700, 5_000, 12_000]),
    st.lists(pieces, max_size=8).map("".join),
)


class Counted:
    """A tokenizer whose work is counted."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.n_characters = 0
        self.first = FirstTokens(self.tokenizer, self.encode)

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        self.n_characters += sum(map(len, texts))
        joined = [text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") for text in texts]
        return self.tokenizer.encode_batch(joined, add_special_tokens=False)


@pytest.fixture(scope="module", params=["pico", "gemma"])
def counted(request: pytest.FixtureRequest) -> Counted:
    return Counted(PICO if request.param == "pico" else gemma.tokenizer_folder())


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(long_texts, min_size=1, max_size=3), max_tokens=st.sampled_from([1, 2, 7, 30]))
def test_first_tokens_are_those_of_the_whole_text(counted: Counted, texts: list[str], max_tokens: int) -> None:
    """In words, in one word without end, and where the normaliser joins or expands characters."""
    whole = [encoding.ids[:max_tokens] for encoding in counted.encode(texts)]
    assert counted.first.ids(texts, max_tokens) == whole


@pytest.mark.parametrize(
    "piece", ["The otter eats fish in the river. ", "a", "ab", "\ufdfa", "字", "\n", "é", "🎉", "=-", "1"]
)
def test_a_long_text_costs_what_its_first_tokens_cost(counted: Counted, piece: str) -> None:
    """Twice as much text is no more work, and at most 72 characters for each token and its 64 neighbours."""
    counted.n_characters = 0
    once = counted.first.ids([piece * (500_000 // len(piece))], 500)
    n_once, counted.n_characters = counted.n_characters, 0
    assert counted.first.ids([piece * (1_000_000 // len(piece))], 500) == once
    assert counted.n_characters == n_once <= 72 * 564
    if piece != "\ufdfa":
        assert once == [encoding.ids[:500] for encoding in counted.encode([piece * (100_000 // len(piece))])]


def test_words_prove_themselves_at_once(counted: Counted) -> None:
    """Text as people write it is read to eight characters for each token, no further."""
    counted.n_characters = 0
    counted.first.ids(["The otter (Lutra lutra) eats fish, crabs and frogs; it hunts at night.\n" * 1000], 500)
    assert counted.n_characters <= 8 * 564


def test_text_without_tokens_ends_somewhere() -> None:
    """Spaces that the tokenizer drops: 512 characters for each token are searched, what comes later is not read."""
    pico = Counted(PICO)
    assert pico.first.ids([" " * 30_000 + "otter"], 1) == [pico.tokenizer.encode("otter").ids[:1]]
    assert pico.first.ids([" " * 1_000_000 + "otter"], 1) == [[]]
    assert pico.n_characters < 100_000


@pytest.mark.parametrize("n_more", [-1, 0, 1, 5_000])
def test_truncation_is_counted_by_the_whole_text(make_reranker: Callable[..., KalmReranker], n_more: int) -> None:
    """Up to the limit nothing is cut, and beyond it the encoding is that of the cut text, with the hash of the whole one."""
    reranker = make_reranker(max_passage_tokens=20)
    n_template = len(reranker.runtime.tokenizer(allow_special_tokens=False).passages(["<Document>: "])[0])
    text = "a " * (20 - n_template + n_more)
    [encoding] = reranker.encode_passages([text])
    assert encoding.n_tokens == min(20, 20 + n_more)
    assert reranker.stats.truncated == (n_more > 0)
    [other] = reranker.encode_passages([text + "a"])
    assert other.text_hash != encoding.text_hash


def test_a_huge_query_scores_like_its_start(make_reranker: Callable[..., KalmReranker]) -> None:
    reranker = make_reranker(max_query_tokens=8)
    assert reranker.score("otter crab " * 500_000, ["fish"]) == reranker.score("otter crab " * 100, ["fish"])
    assert len(reranker.score("\ufdfa" * 300_000, ["fish"])) == 1


@pytest.mark.parametrize("name", ["instruction", "system_instruction"])
@pytest.mark.parametrize(("text", "n_characters"), [("x" * 16_385, 16_385), ("\ufdfa" * 1_000, 18_000)])
def test_instructions_are_never_cut_but_bounded(
    make_reranker: Callable[..., KalmReranker], name: str, text: str, n_characters: int
) -> None:
    """In characters before anything is loaded: one can stand for eighteen."""
    rule = f"{name}: an instruction must have at most 16384 characters, .* but got {n_characters}; shorten it"
    with pytest.raises(SettingsError, match=rule):
        make_reranker(**{name: text})


def test_instructions_are_bounded_in_tokens(make_reranker: Callable[..., KalmReranker]) -> None:
    """Some scripts have several tokens for each character."""
    rule = r"may take 8192 tokens together with the template, but take 3\d{4}; shorten them"
    with pytest.raises(SettingsError, match=rule):
        make_reranker(instruction="\ua000" * 10_000).score("query", ["passage"])
    assert make_reranker(instruction="\ua000" * 1_000).score("query", ["passage"])


def test_an_instruction_of_a_call_is_bounded_too(make_reranker: Callable[..., KalmReranker]) -> None:
    with pytest.raises(SettingsError, match=r"an instruction must have at most 16384 characters, .* but got 20000"):
        make_reranker().rank("query", ["passage"], instruction="x" * 20_000)
