"""The lexical first stage."""

from __future__ import annotations

import pytest

from kalm_integrations.corpora.bm25 import BM25
from kalm_integrations.errors import SettingsError


def test_bm25_finds_words() -> None:
    """Best first, and all passages where there are fewer than asked for."""
    [(indices, scores)] = BM25(["the wing", "drag of a wing", "bowl"]).search(["drag wing"], 10)
    assert indices[0] == 1
    assert sorted(indices) == [0, 1, 2]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("passages", [[], ["the of", ""]])
def test_bm25_refuses_passages_without_words(passages: list[str]) -> None:
    with pytest.raises(SettingsError, match=f"none of {len(passages)} does"):
        BM25(passages)
