"""Cross-encoders and bi-encoders of sentence-transformers as peers and first stages, on random models of real classes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizer

from kalm_integrations import KalmReranker
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.peers import load_cross_encoder
from kalm_integrations.errors import MissingExtraError, SettingsError
from kalm_integrations.evaluation.candidates import find_candidates
from kalm_integrations.evaluation.metrics import bootstrap_interval, ndcg_at_10
from kalm_integrations.evaluation.report import evaluate

WORDS = ["wing", "drag", "lift", "bowl", "team", "league", "jazz", "river"]


def save_bert(folder: Path, architecture: type, **config: int) -> Path:
    torch.manual_seed(len(folder.name))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model = architecture(BertConfig(vocab_size=5 + len(WORDS), **sizes, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("cross") / "a-cross-encoder", BertForSequenceClassification, num_labels=1)


@pytest.fixture(scope="module")
def bi_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformer = Transformer(str(save_bert(tmp_path_factory.mktemp("bert"), BertModel)))
    folder = tmp_path_factory.mktemp("bi") / "a-bi-encoder"
    SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())]).save(str(folder))
    return folder


@pytest.fixture(scope="module")
def collection() -> Collection:
    draw = random.Random(0)
    passages = {f"p{i}": " ".join(draw.choices(WORDS, k=6)) for i in range(14)}
    queries = {f"q{i}": " ".join(draw.sample(WORDS, 2)) for i in range(8)}
    return Collection("words", passages, queries, {q: {draw.choice(list(passages)): 1} for q in queries})


def test_peers_order_the_same_candidates_by_their_own_scores(
    collection: Collection, cross_encoder: Path, bi_encoder: Path, make_reranker: Callable[..., KalmReranker]
) -> None:
    """Each is measured like the reranker, and is a baseline with a paired interval for all others."""
    report = evaluate(
        make_reranker(),
        collection,
        ratios=[4],
        codecs=["fp32"],
        cross_encoders=[str(cross_encoder)],
        bi_encoders=[str(bi_encoder)],
        top_k=6,
        seed=2,
    )
    candidates = find_candidates(collection, top_k=6)
    scorer, encoder = CrossEncoder(str(cross_encoder)), SentenceTransformer(str(bi_encoder))
    values = {"bm25": ndcg_at_10(collection.qrels, {q: found.ids for q, found in candidates.items()})}
    for name in ("a-cross-encoder", "a-bi-encoder"):
        rankings = {}
        for query_id, found in candidates.items():
            texts = [collection.passages[i] for i in found.ids]
            if name == "a-cross-encoder":
                scores = [float(s) for s in scorer.predict([(found.query, text) for text in texts])]
            else:
                scores = encoder.similarity(encoder.encode([found.query]), encoder.encode(texts))[0].tolist()
            rankings[query_id] = [i for _, i in sorted(zip(scores, found.ids, strict=True), key=lambda pair: -pair[0])]
        values[name] = ndcg_at_10(collection.qrels, rankings)
    systems = {system.name: system for system in report.systems}
    assert list(systems) == ["bm25", "a-cross-encoder", "a-bi-encoder", "reranked r4 fp32", "+ bm25 r4 fp32"]
    for name, by_query in values.items():
        assert systems[name].means["nDCG@10"] == pytest.approx(sum(by_query.values()) / len(by_query))
    difference = systems["a-bi-encoder"].differences["a-cross-encoder"]
    gains = [values["a-bi-encoder"][q] - values["a-cross-encoder"][q] for q in candidates]
    assert difference.mean == pytest.approx(sum(gains) / len(gains))
    low, high = bootstrap_interval(gains, seed=2)
    assert (difference.low, difference.high) == pytest.approx((low, high), abs=0.05)
    assert set(systems["reranked r4 fp32"].differences) == {"bm25", "a-cross-encoder", "a-bi-encoder"}


def test_bi_encoder_is_a_first_stage(collection: Collection, bi_encoder: Path) -> None:
    """The nearest passages by cosine, best first, with their scores."""
    encoder = SentenceTransformer(str(bi_encoder))
    similarity = encoder.similarity(
        encoder.encode(list(collection.queries.values())), encoder.encode(list(collection.passages.values()))
    )
    candidates = find_candidates(collection, str(bi_encoder), top_k=3)
    for (query_id, found), row in zip(candidates.items(), similarity, strict=True):
        assert query_id in collection.queries
        values, _ = torch.topk(row, 3)
        assert found.scores == pytest.approx(values.tolist(), abs=1e-5)
        own = dict(zip(collection.passages, row.tolist(), strict=True))
        assert [own[i] for i in found.ids] == pytest.approx(found.scores, abs=1e-5)


def test_models_that_cannot_be_peers_are_refused(collection: Collection, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"a bi-encoder must be a folder or a hub id .*, but 'no/where' is not"):
        find_candidates(collection, "no/where")
    with pytest.raises(SettingsError, match=r"a cross-encoder must be a folder or a hub id .*, but 'no/where' is not"):
        load_cross_encoder("no/where")
    folder = save_bert(tmp_path / "three", BertForSequenceClassification, num_labels=3)
    with pytest.raises(SettingsError, match=r"must have one output, the margin, but .* has 3"):
        load_cross_encoder(str(folder))


def test_missing_sentence_transformers_is_named(collection: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    for call in (lambda: find_candidates(collection, "some/model"), lambda: load_cross_encoder("some/model")):
        with pytest.raises(MissingExtraError, match=r'pip install "kalm-integrations\[sentence-transformers\]"'):
            call()
