"""Under mteb's protocol we get the numbers of mteb's own wrapper of the model, with each passage encoded once."""

import subprocess
import sys
import zlib

import mteb
import numpy as np
import pytest
import torch
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import CrossEncoderProtocol
from mteb.models.model_implementations.kalm_reranker import KaLMRerankerWrapper
from mteb.models.model_meta import ModelMeta
from mteb.types import PromptType
from tools.checkpoints import TEXTS
from tools.paths import DOCS
from torch.utils.data import DataLoader

from kalm_integrations.corpora.beir import Collection
from kalm_integrations.errors import MissingExtraError, SettingsError
from kalm_integrations.evaluation.mteb import MtebReranker, choose_tasks, rerank_tasks, to_summary
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


class SampleRetrieval(SampleReranking):
    """The same without candidates: a first stage has to find them."""

    metadata = SampleReranking.metadata.model_copy(update={"name": "SampleRetrieval", "type": "Retrieval"})

    def load_data(self, **kwargs: object) -> None:
        super().load_data()
        self.dataset["default"]["test"]["top_ranked"] = None


class BagOfWords:
    """A first stage under mteb's encoder protocol: the words that a text shares with another."""

    mteb_model_meta = ModelMeta.create_empty(overwrites={"name": "test/words", "revision": "1"})

    def __init__(self) -> None:
        self.n_searches = 0

    def encode(self, inputs: DataLoader, *, prompt_type: PromptType, **task: object) -> np.ndarray:
        self.n_searches += prompt_type == PromptType.query
        vectors = []
        for batch in inputs:
            for text in batch["text"]:
                vector = np.zeros(512, dtype=np.float32)
                for word in text.lower().split():
                    vector[zlib.crc32(word.encode()) % 512] += 1
                vectors.append(vector / np.linalg.norm(vector))
        return np.stack(vectors)

    def similarity(self, embeddings1: np.ndarray, embeddings2: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(embeddings1) @ np.asarray(embeddings2).T)

    def similarity_pairwise(self, embeddings1: np.ndarray, embeddings2: np.ndarray) -> torch.Tensor:
        return torch.from_numpy((np.asarray(embeddings1) * np.asarray(embeddings2)).sum(axis=1))


def test_two_stages_give_the_wrapper_s_ndcg_and_are_not_run_twice(tiny_checkpoint, wrapper, tmp_path):
    """From encodings kept on disk; what is done is read from the output folder the next time."""
    first_stage = BagOfWords()
    settings = {"encodings": tmp_path / "encodings", "storage_codec": "fp32", "long_passages": "cut"}
    model = MtebReranker(tiny_checkpoint, **settings)
    [scores] = rerank_tasks(model, [SampleRetrieval()], tmp_path, first_stage=first_stage, top_k=6)
    assert (scores.task, first_stage.n_searches) == ("SampleRetrieval", 1)
    task = SampleRetrieval().convert_to_reranking(tmp_path / "test__words", top_k=6)
    assert {len(ids) for ids in task.dataset["default"]["test"]["top_ranked"].values()} == {6}
    result = mteb.evaluate(wrapper, task, cache=None, co2_tracker=False, show_progress_bar=False)
    assert scores.reranked == pytest.approx(result.task_results[0].get_score(), abs=1e-5)
    assert scores.reranked != scores.first_stage
    again = MtebReranker(tiny_checkpoint, **settings)
    assert rerank_tasks(again, [SampleRetrieval()], tmp_path, first_stage=first_stage, top_k=6) == [scores]
    assert (first_stage.n_searches, again.reranker.stats.passages_scored) == (1, 0)
    summary = to_summary(model, "sample", [scores], "test/words", 6)
    assert summary["tasks"] == {"SampleRetrieval": {"first_stage": scores.first_stage, "reranked": scores.reranked}}
    assert (summary["mean"], summary["revision"]) == (scores.reranked, model.reranker.fingerprint)


def test_interrupted_first_stage_is_run_again(tiny_checkpoint, tmp_path):
    """Its predictions count when they are complete, whatever mteb has cached."""
    model = MtebReranker(tiny_checkpoint)
    rerank_tasks(model, [SampleRetrieval()], tmp_path, first_stage=BagOfWords(), top_k=3)
    (tmp_path / "test__words" / "SampleRetrieval_predictions.json").unlink()
    again = BagOfWords()
    rerank_tasks(model, [SampleRetrieval()], tmp_path, first_stage=again, top_k=3)
    assert again.n_searches == 1


def test_reranking_tasks_bring_their_candidates(make_reranker, wrapper, tmp_path):
    first_stage = BagOfWords()
    [scores] = rerank_tasks(MtebReranker(make_reranker()), [SampleReranking()], tmp_path, first_stage=first_stage)
    assert (scores.first_stage, first_stage.n_searches) == (None, 0)
    assert scores.reranked == pytest.approx(ndcg(wrapper), abs=1e-5)


def test_second_run_encodes_nothing_in_a_new_process_either(tiny_checkpoint, tmp_path):
    """Encodings are kept by checkpoint, ratio and codec; another setting makes its own."""
    texts = [*dict.fromkeys(TEXTS), "a fourth passage"]
    inputs = [[{"text": ["who won?"] * len(texts)}], [{"text": texts}]]
    first = MtebReranker(tiny_checkpoint, encodings=tmp_path)
    scores = first.predict(*inputs)
    assert first.reranker.stats.passages_encoded == len(texts)
    second = MtebReranker(tiny_checkpoint, encodings=tmp_path)
    np.testing.assert_allclose(second.predict(*inputs), scores, atol=1e-6)
    assert second.reranker.stats.passages_encoded == 0
    assert second.reranker.stats.metadata_hits == len(texts)
    code = (
        "from kalm_integrations.evaluation.mteb import MtebReranker\n"
        f"model = MtebReranker({str(tiny_checkpoint)!r}, encodings={str(tmp_path)!r})\n"
        f"model.predict(*{inputs!r})\n"
        "print(model.reranker.stats.passages_encoded)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["0"]
    for settings in ({"compression_ratio": 8}, {"storage_codec": "int8"}, {"max_passage_tokens": 16}):
        other = MtebReranker(tiny_checkpoint, encodings=tmp_path, **settings)
        other.predict(*inputs)
        assert other.reranker.stats.passages_encoded == len(texts)


def test_an_open_reranker_brings_its_own_storage():
    with pytest.raises(SettingsError, match=r"encodings needs a model by name or folder, .*, but got FakeReranker"):
        MtebReranker(FakeReranker(), encodings="folder")


def test_benchmarks_of_the_paper_are_mteb_s():
    """The names that docs/evaluation.md gives, as the installed mteb has them."""
    beir = choose_tasks("BEIR", [], ["CQADupstackRetrieval", "MSMARCO"])
    assert len(beir) == 13
    [miracl] = choose_tasks(None, ["MIRACLRetrieval"])
    assert len(miracl.metadata.eval_langs) == 18
    assert len(choose_tasks("LMEB", [])) == 22
    assert mteb.get_model_meta("KaLM-Embedding/KaLM-embedding-multilingual-mini-instruct-v2.5")
    for table in (
        "--benchmark BEIR --without CQADupstackRetrieval --without MSMARCO",
        "--task MIRACLRetrieval",
        "--benchmark LMEB",
    ):
        assert table in (DOCS / "evaluation.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("BIER", []), "--benchmark and --task must be names that mteb knows: 'BIER' not found. Did you mean: BEIR?"),
        ((None, ["SciFacts"]), "names that mteb knows: 'SciFacts' not found. Did you mean: 'SciFact'?"),
        ((None, ["qqqxyz"]), r"'qqqxyz' not found .* \(`mteb available-benchmarks` and `mteb available-tasks` list them\)"),
        ((None, []), "there must be tasks to run: name one, such as --task SciFact, or a benchmark, such as --benchmark BEIR"),
        ((None, ["SciFact"], ["SciFact"]), "there must be tasks to run, .* but none is left"),
        (("BEIR", [], ["Nope"]), "but Nope is none of them"),
    ],
)
def test_unknown_tasks_are_refused(names, message):
    with pytest.raises(SettingsError, match=message):
        choose_tasks(*names)


def test_tasks_and_first_stages_of_another_kind_are_refused(make_reranker, tmp_path):
    model = MtebReranker(make_reranker())
    with pytest.raises(SettingsError, match=r"must be one of retrieval or reranking, but STS12 is of type STS"):
        rerank_tasks(model, [mteb.get_task("STS12")], tmp_path, first_stage=BagOfWords())
    with pytest.raises(
        SettingsError, match="the first stage must be a model that mteb knows and can load, but 'no/such-model' is not"
    ):
        rerank_tasks(model, [SampleRetrieval()], tmp_path, first_stage="no/such-model")


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
