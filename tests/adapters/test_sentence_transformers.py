"""The CrossEncoder-shaped face does what each host of it expects, and encodes each passage once."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from haystack import Document
from haystack_integrations.components.rankers.sentence_transformers import SentenceTransformersSimilarityRanker
from llama_index.core.postprocessor import SentenceTransformerRerank
from llama_index.core.schema import NodeWithScore, TextNode
from sentence_transformers import SentenceTransformer
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.util import mine_hard_negatives
from tokenizers import Tokenizer
from tools.checkpoints import TEXTS
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from kalm_integrations import KalmReranker, Passage
from kalm_integrations.errors import SettingsError
from kalm_integrations.sentence_transformers import KalmCrossEncoder
from kalm_integrations.testing import FakeReranker

PASSAGES = [*dict.fromkeys(TEXTS), "The Panthers won.", "", "A wing gives lift and drag."]
QUERIES = ["Who won?", "What lifts a wing?"]


@pytest.fixture
def reranker(make_reranker) -> KalmReranker:
    return make_reranker()


@pytest.fixture
def model(reranker) -> KalmCrossEncoder:
    return KalmCrossEncoder(reranker)


def best_first(reranker: KalmReranker, query: str) -> list[str]:
    return [PASSAGES[passage.index] for passage in reranker.rank(query, PASSAGES)]


def test_predict_scores_interleaved_pairs_in_their_order_and_encodes_each_passage_once(model, reranker, make_reranker):
    pairs = [(query, passage) for passage in PASSAGES + PASSAGES[:2] for query in QUERIES]
    scores = model.predict(pairs)
    assert scores.dtype == np.float32
    assert scores.shape == (len(pairs),)
    assert reranker.stats.passages_encoded == len(PASSAGES)
    expected = {query: dict(zip(PASSAGES, make_reranker().score(query, PASSAGES), strict=True)) for query in QUERIES}
    np.testing.assert_allclose(scores, [expected[query][passage] for query, passage in pairs], atol=1e-6)


def test_a_long_passage_is_cut_or_read_in_windows():
    """And scores by the best one; settings go on to the reranker."""
    filler = "The road to the market was closed. " * 40
    texts = [f"{filler}Otters live on fish, crabs and frogs.", "The Rhine rises in the Swiss Alps."]
    best = {}
    for mode in ("cut", "windows"):
        model = KalmCrossEncoder("pico", max_passage_tokens=128, long_passages=mode, max_windows=9)
        best[mode] = model.rank("What do otters eat?", texts)[0]["corpus_id"]
        scores = model.predict([("What do otters eat?", text) for text in texts])
        assert scores.argmax() == best[mode]
    assert best == {"cut": 1, "windows": 0}
    with pytest.raises(SettingsError, match="long_passages"):
        KalmCrossEncoder("pico", long_passages="split")


def test_predict_takes_what_cross_encoder_takes_as_pairs(model):
    pairs = [("Who won?", "The Panthers won."), ("Who won?", "Nobody.")]
    scores = model.predict(pairs)
    assert model.predict([list(pair) for pair in pairs]).tolist() == scores.tolist()
    assert model.predict(np.array(pairs)).tolist() == scores.tolist()
    single = model.predict(pairs[0])
    assert single.shape == ()
    # In another batch, and so with other low bits.
    assert single == pytest.approx(scores[0], abs=1e-6)
    assert model.predict([]).shape == (0,)


def test_predict_returns_the_type_asked_for(model):
    pairs = [("Who won?", passage) for passage in PASSAGES]
    scores = model.predict(pairs)
    tensor = model.predict(pairs, convert_to_tensor=True)
    assert (tensor.dtype, tensor.tolist()) == (torch.float32, scores.tolist())
    scalars = model.predict(pairs, convert_to_numpy=False)
    assert [scalar.shape for scalar in scalars] == [()] * len(pairs)
    assert [float(scalar) for scalar in scalars] == scores.tolist()


def test_activation_is_applied_to_margins(model, reranker):
    pairs = [("Who won?", passage) for passage in PASSAGES]
    margins = {passage.index: passage.margin for passage in reranker.rank("Who won?", PASSAGES)}
    raw = model.predict(pairs, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(raw, [margins[i] for i in range(len(pairs))], rtol=1e-6)
    np.testing.assert_allclose(model.predict(pairs, activation_fn=torch.nn.Sigmoid()), model.predict(pairs), atol=1e-7)


def test_rank_returns_plain_floats_best_first(model, reranker):
    expected = reranker.rank("Who won?", PASSAGES, top_k=3)
    results = model.rank("Who won?", PASSAGES, top_k=3, return_documents=True)
    assert [r["corpus_id"] for r in results] == [passage.index for passage in expected]
    assert [r["text"] for r in results] == [PASSAGES[passage.index] for passage in expected]
    assert all(type(r["score"]) is float for r in results)
    assert model.rank("Who won?", []) == []


def test_passages_with_encodings_are_not_encoded_again(reranker, make_reranker):
    metadata = reranker.encode_to_metadata(PASSAGES)
    passages = [Passage(text, m["kalm_encoding"]) for text, m in zip(PASSAGES, metadata, strict=True)]
    later = KalmCrossEncoder(make_reranker())
    later.predict([("Who won?", passage) for passage in passages])
    results = later.rank("Who won?", passages, return_documents=True)
    assert results[0]["text"] in PASSAGES
    assert later.reranker.stats.passages_encoded == 0


def test_prompt_is_the_instruction(model, reranker):
    pairs = [("Who won?", passage) for passage in PASSAGES]
    expected = reranker.score("Who won?", PASSAGES, instruction="Find losers.")
    np.testing.assert_allclose(model.predict(pairs, prompt="Find losers."), expected, atol=1e-6)
    assert model.predict(pairs).tolist() != pytest.approx(expected, abs=1e-6)
    assert model.rank("Who won?", PASSAGES, prompt="Find losers.")[0]["score"] == pytest.approx(max(expected), abs=1e-6)


def test_arguments_that_cannot_be_honoured_are_refused():
    model = KalmCrossEncoder(FakeReranker())
    with pytest.raises(SettingsError, match="cannot honour pool, prompt_name; leave them out"):
        model.predict([("q", "p")], prompt_name="web", pool={}, device=None, apply_softmax=False)
    with pytest.raises(SettingsError, match=r"must be pairs of a query and a passage, but sentences\[1\] is \('q',\)"):
        model.predict([("q", "p"), ("q",)])
    with pytest.raises(SettingsError, match="top_k must be a positive whole number"):
        model.rank("q", ["p"], top_k=0)


def test_face_opens_a_checkpoint_with_settings(tiny_checkpoint):
    assert KalmCrossEncoder(tiny_checkpoint, compression_ratio=2).reranker.compression_ratio == 2


def test_progress_bar_only_where_asked_for(capsys):
    model = KalmCrossEncoder(FakeReranker())
    model.predict([("q", "p")])
    assert capsys.readouterr().err == ""
    model.predict([("q", "p")], show_progress_bar=True)
    assert "Scoring" in capsys.readouterr().err


def test_module_does_not_load_sentence_transformers():
    code = "import sys, kalm_integrations.sentence_transformers; assert 'sentence_transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A random cross-encoder, because LlamaIndex's reranker opens one before it can be given another."""
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=1
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_llama_index_sentence_transformer_rerank(model, reranker, make_reranker, bert):
    """The stock reranker returns our order, with the passages that several queries share encoded once."""
    stock = SentenceTransformerRerank(model=str(bert), top_n=3, device="cpu")
    stock._model = model
    for query in QUERIES:
        nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for text in PASSAGES]
        results = stock.postprocess_nodes(nodes, query_str=query)
        assert [result.node.text for result in results] == best_first(make_reranker(), query)[:3]
    assert reranker.stats.passages_encoded == len(PASSAGES)


@pytest.mark.parametrize("scale_score", [True, False])
def test_haystack_sentence_transformers_ranker(model, reranker, make_reranker, scale_score):
    """The stock ranker returns our order and, by `scale_score`, our scores or margins."""
    stock = SentenceTransformersSimilarityRanker(top_k=3, scale_score=scale_score)
    stock._cross_encoder = model
    for query in QUERIES:
        documents = stock.run(query=query, documents=[Document(content=text) for text in PASSAGES])["documents"]
        expected = make_reranker().rank(query, PASSAGES, top_k=3)
        assert [document.content for document in documents] == [PASSAGES[passage.index] for passage in expected]
        scores = [passage.score if scale_score else passage.margin for passage in expected]
        assert [document.score for document in documents] == pytest.approx(scores, abs=1e-5)
    assert reranker.stats.passages_encoded == len(PASSAGES)


def test_cross_encoder_reranking_evaluator(model, reranker, make_reranker):
    """The evaluator's reciprocal rank is the one of our own order."""
    positives = [PASSAGES[4], PASSAGES[1]]
    samples = [
        {"query": query, "positive": [positive], "documents": PASSAGES}
        for query, positive in zip(QUERIES, positives, strict=True)
    ]
    metrics = CrossEncoderRerankingEvaluator(samples, name="tiny", write_csv=False)(model)
    ranks = [best_first(make_reranker(), q).index(positive) + 1 for q, positive in zip(QUERIES, positives, strict=True)]
    assert metrics["tiny_mrr@10"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert reranker.stats.passages_encoded == len(PASSAGES)


def test_mine_hard_negatives(model, reranker, make_reranker, tiny_checkpoint):
    """The negative mined for each query is the best by our scores that `max_score` lets through."""
    texts = [text for text in PASSAGES if text]
    positives = dict(zip(QUERIES, texts, strict=False))
    scores = {query: dict(zip(texts, make_reranker().score(query, texts), strict=True)) for query in QUERIES}
    max_score = sorted(score for text, score in scores[QUERIES[0]].items() if text != positives[QUERIES[0]])[-1] - 1e-6
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))
    mined = mine_hard_negatives(
        Dataset.from_dict({"query": list(positives), "answer": list(positives.values())}),
        SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu"),
        corpus=texts,
        cross_encoder=model,
        range_max=len(texts) - 1,
        max_score=max_score,
        num_negatives=1,
        verbose=False,
    )
    for row in mined:
        eligible = [t for t in texts if t != row["answer"] and scores[row["query"]][t] < max_score]
        assert row["negative"] == max(eligible, key=scores[row["query"]].get)
    assert list(mined["query"]) == QUERIES
    assert reranker.stats.passages_encoded == len(texts)
