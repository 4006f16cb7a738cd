"""The fake that users test with behaves like a reranker, without torch."""

import subprocess
import sys

import pytest

from kalm_integrations import Passage, Reranker
from kalm_integrations.errors import SettingsError
from kalm_integrations.testing import FakeReranker


def test_fake_is_a_reranker_and_loads_no_torch():
    assert isinstance(FakeReranker(), Reranker)
    code = "import sys, kalm_integrations.testing; assert 'torch' not in sys.modules, 'torch was loaded'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fake_ranks_by_words_and_counts_encodes():
    fake = FakeReranker()
    [metadata] = fake.encode_to_metadata(["the panthers won"])
    stored = Passage("the panthers won", metadata["kalm_encoding"])
    assert [p.index for p in fake.rank("who won", ["nothing", stored], top_k=1)] == [1]
    assert (fake.stats.passages_encoded, fake.stats.metadata_hits) == (2, 1)
    assert fake.find_unencoded([stored, Passage("other", stored.encoding), Passage("x")]) == [1, 2]
    assert FakeReranker("another").find_unencoded([stored]) == [0]


def test_fake_scores_sentences_by_words():
    text = "Rain is wet. The \ud83d panthers won!\n東京。"
    spans = FakeReranker().highlight("who won", text)
    assert [text[span.start : span.end] for span in spans] == ["The \ud83d panthers won!", "Rain is wet.", "東京。"]
    assert spans[0].score > spans[1].score == spans[2].score
    ranked = FakeReranker().rank("who won", ["rain", text, ""], spans=2)
    assert [passage.spans for passage in ranked] == [
        tuple(spans),
        FakeReranker().rank("who won", ["rain"], spans=1)[0].spans,
        None,
    ]
    assert FakeReranker().highlight("who won", "") == []


def test_fake_refuses_bad_top_k():
    with pytest.raises(SettingsError, match="top_k must be a positive whole number"):
        FakeReranker().rank("q", ["a"], top_k=0)
