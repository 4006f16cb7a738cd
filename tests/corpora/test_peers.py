"""Cross-encoders and bi-encoders of sentence-transformers give what they give there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from tools.corpora import draw_collection
from tools.peers import make_cross_encoder

from kalm_integrations.corpora.peers import (
    load_bi_encoder,
    load_cross_encoder,
    score_by_bi_encoder,
    score_by_cross_encoder,
    search,
)
from kalm_integrations.errors import MissingExtraError, SettingsError

COLLECTION = draw_collection()
PAIRS = [(query, passage) for query in COLLECTION.queries.values() for passage in COLLECTION.passages.values()]


def test_scores_are_the_margins_of_a_cross_encoder(cross_encoder: str) -> None:
    expected = CrossEncoder(cross_encoder, activation_fn=torch.nn.Identity()).predict(PAIRS).tolist()
    assert len(set(expected)) > 1
    assert score_by_cross_encoder(cross_encoder, PAIRS) == pytest.approx(expected, abs=1e-5)


def similarities(bi_encoder: str) -> torch.Tensor:
    encoder = SentenceTransformer(bi_encoder)
    queries, passages = (encoder.encode(list(texts.values())) for texts in (COLLECTION.queries, COLLECTION.passages))
    return encoder.similarity(queries, passages)


def test_scores_are_the_cosines_of_a_bi_encoder(bi_encoder: str) -> None:
    assert score_by_bi_encoder(bi_encoder, PAIRS) == pytest.approx(similarities(bi_encoder).flatten().tolist(), abs=1e-5)


def test_a_search_finds_the_nearest_by_cosine(bi_encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Best first, with their scores, however many queries there are at a time."""
    monkeypatch.setattr("kalm_integrations.corpora.peers.QUERIES_PER_BLOCK", 4)
    run = search(bi_encoder, COLLECTION.passages, COLLECTION.queries, k=3)
    assert list(run) == list(COLLECTION.queries)
    for found, row in zip(run.values(), similarities(bi_encoder), strict=True):
        scores = [score for _, score in found]
        assert scores == pytest.approx(torch.topk(row, 3).values.tolist(), abs=1e-5)
        own = dict(zip(COLLECTION.passages, row.tolist(), strict=True))
        assert [own[i] for i, _ in found] == pytest.approx(scores, abs=1e-5)
    assert len(search(bi_encoder, COLLECTION.passages, COLLECTION.queries, k=100)["q0"]) == len(COLLECTION.passages)


def test_models_that_cannot_be_peers_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"a bi-encoder must be a folder or a hub id .*, but 'no/where' is not"):
        load_bi_encoder("no/where")
    with pytest.raises(SettingsError, match=r"a cross-encoder must be a folder or a hub id .*, but 'no/where' is not"):
        load_cross_encoder("no/where")
    with pytest.raises(SettingsError, match=r"must have one output, the margin, but .* has 3"):
        load_cross_encoder(make_cross_encoder(tiny_checkpoint, tmp_path, num_labels=3))


@pytest.mark.parametrize("load", [load_bi_encoder, load_cross_encoder])
def test_missing_sentence_transformers_is_named(load: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingExtraError, match=r'pip install "kalm-integrations\[sentence-transformers\]"'):
        load("some/model")
