"""Under mteb's protocol we get the numbers of mteb's own wrapper of the model, with each passage encoded once."""

import subprocess
import sys

import mteb
import numpy as np
import pytest
from checkpoints import TEXTS
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import CrossEncoderProtocol
from mteb.models.model_implementations.kalm_reranker import KaLMRerankerWrapper
from mteb.models.model_meta import ModelMeta
from torch.utils.data import DataLoader

from kalm_integrations.errors import MissingExtraError
from kalm_integrations.evaluation.beir import Collection
from kalm_integrations.evaluation.mteb import MtebReranker
from kalm_integrations.samples import XQUAD_EN
from kalm_integrations.testing import FakeReranker

N_QUERIES, N_CANDIDATES, N_PASSAGES = 12, 8, 20


class SampleReranking(AbsTaskRetrieval):
    """The first questions of the sample, each with its own passage and others that serve several questions."""

    metadata = TaskMetadata(
        name="SampleReranking",
        description="in memory",
        dataset={"path": "in-memory", "revision": "1"},
        type="Reranking",
        category="t2t",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
    )

    def load_data(self, **kwargs: object) -> None:
        collection = Collection.read(XQUAD_EN)
        passages = {i: text[:160] for i, text in list(collection.passages.items())[:N_PASSAGES]}
        answered = [q for q, judged in collection.qrels.items() if set(judged) <= set(passages)]
        queries = answered[:: len(answered) // N_QUERIES][:N_QUERIES]
        others = list(passages)
        self.dataset = {
            "default": {
                "test": {
                    "corpus": Dataset.from_list([{"id": i, "title": "", "text": text} for i, text in passages.items()]),
                    "queries": Dataset.from_list([{"id": q, "text": collection.queries[q]} for q in queries]),
                    "relevant_docs": {q: collection.qrels[q] for q in queries},
                    "top_ranked": {
                        q: sorted({*collection.qrels[q], *(others + others)[n : n + N_CANDIDATES]})
                        for n, q in enumerate(queries)
                    },
                }
            }
        }
        self.data_loaded = True


@pytest.fixture(scope="module")
def wrapper(tiny_checkpoint) -> KaLMRerankerWrapper:
    reference = KaLMRerankerWrapper(str(tiny_checkpoint), device="cpu", dtype="float32")
    # It reads the score at the last real position, which is right for right padding only.
    reference.tokenizer.padding_side = "right"
    reference.mteb_model_meta = ModelMeta.create_empty(overwrites={"name": "test/wrapper", "revision": "1"})
    return reference


def ndcg(model: CrossEncoderProtocol) -> float:
    result = mteb.evaluate(model, SampleReranking(), cache=None, co2_tracker=False, show_progress_bar=False)
    [scores] = result.task_results[0].scores["test"]
    return scores["ndcg_at_10"]


def test_same_ndcg_as_the_wrapper_with_one_encode_per_passage(make_reranker, wrapper):
    reranker = make_reranker()
    model = MtebReranker(reranker)
    assert isinstance(model, CrossEncoderProtocol)
    assert ndcg(model) == ndcg(wrapper)
    task = SampleReranking()
    task.load_data()
    candidates = task.dataset["default"]["test"]["top_ranked"].values()
    unique = {passage for ids in candidates for passage in ids}
    assert reranker.stats.passages_encoded == len(unique) < sum(map(len, candidates))


def test_same_scores_as_the_wrapper_where_the_task_has_instructions(make_reranker, wrapper):
    passages = list(dict.fromkeys(TEXTS))
    rows = [("who won?", "Find winners."), ("who won?", "Find losers."), ("lift", "Find winners.")] * 3
    inputs = [
        DataLoader(Dataset.from_dict({"text": [r[0] for r in rows], "instruction": [r[1] for r in rows]}), batch_size=4),
        DataLoader(Dataset.from_dict({"text": [passages[i // 3] for i in range(len(rows))]}), batch_size=4),
    ]
    task = {"task_metadata": SampleReranking.metadata, "hf_split": "test", "hf_subset": "default"}
    scores = MtebReranker(make_reranker()).predict(*inputs, **task)
    np.testing.assert_allclose(scores, wrapper.predict(*inputs, **task), atol=1e-5)


def test_results_of_other_settings_are_filed_apart(tiny_checkpoint):
    """mteb caches results by name, revision and experiment; the encoder's settings are in these."""
    metas = [
        MtebReranker(tiny_checkpoint, **settings).mteb_model_meta
        for settings in ({}, {"max_passage_tokens": 64}, {"compression_ratio": 8})
    ]
    assert {meta.name for meta in metas} == {f"kalm-integrations/{tiny_checkpoint.name}"}
    assert len({(meta.revision, meta.experiment_name) for meta in metas}) == 3


def test_pairs_of_unequal_number_are_refused():
    with pytest.raises(ValueError, match="longer than"):
        MtebReranker(FakeReranker()).predict([{"text": ["q"]}], [{"text": ["a", "b"]}])


def test_missing_mteb_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb.models.model_meta", None)
    with pytest.raises(MissingExtraError, match="pip install mteb"):
        MtebReranker(FakeReranker())


def test_module_does_not_load_mteb():
    code = "import sys, kalm_integrations.evaluation.mteb; assert 'mteb' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
