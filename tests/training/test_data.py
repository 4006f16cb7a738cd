"""Training data: what is read, and what a cluster holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from tools.training_data import ARCHITECTURE, PASSAGES, QUERIES, examples, write_collection, write_lines
from transformers import PreTrainedTokenizerFast

from kalm_integrations import KalmReranker
from kalm_integrations.core.checkpoint import prompts
from kalm_integrations.core.checkpoint.opened import Checkpoint
from kalm_integrations.core.checkpoint.tokenization import PromptTokenizer
from kalm_integrations.core.settings import INSTRUCTION, SYSTEM_INSTRUCTION
from kalm_integrations.errors import SettingsError
from kalm_integrations.training.config import (
    CollectionConfig,
    PhaseConfig,
    PseudoQueryConfig,
    TeacherConfig,
    TrainConfig,
)
from kalm_integrations.training.data import N_NEIGHBOURS, Cluster, ClusterDataset, Collator, Source
from kalm_integrations.training.distillation import fit_conditional_logit
from kalm_integrations.training.initialize import token_embeddings
from kalm_integrations.training.pairs import PairTokenizer
from kalm_integrations.training.sources import TrainingSet, read_training_set
from kalm_integrations.training.trainer import train


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> PromptTokenizer:
    return PromptTokenizer(Checkpoint.open(tiny_checkpoint).load_tokenizer())


def read(path: Path, **settings: Any) -> TrainingSet:
    return read_training_set(CollectionConfig(path=path, name="data", **settings))


def dataset(
    texts: TrainingSet, tokenizer: PromptTokenizer, clusters_per_step: int = 1, pseudo_rate: float = 0.0, **phase: Any
) -> ClusterDataset:
    settings = PhaseConfig(**{"steps": 8, **phase})
    sources = [Source.build(texts, seed=0)]
    pairs = PairTokenizer(tokenizer, SYSTEM_INSTRUCTION, INSTRUCTION, 1024, 512).limited_to(settings)
    return ClusterDataset(sources, [None], pairs, settings, clusters_per_step, 0, pseudo_rate)


def texts_of(cluster: Cluster, tokenizer: PromptTokenizer) -> list[tuple[list[int], list[str]]]:
    """Each prompt with the texts of its candidates."""
    known = {tuple(tokenizer.passages([prompts.passage_text(p)])[0]): p for p in PASSAGES}
    passages = [known[tuple(ids)] for ids in cluster.passages]
    return [(prompt, [passages[i] for i in ids]) for prompt, ids in zip(cluster.prompts, cluster.candidates, strict=True)]


def test_pseudo_queries_are_spans_of_their_passage(tmp_path):
    config = PseudoQueryConfig(per_passage=3, min_words=2, max_words=4, dropped=0.3)
    texts = read(write_collection(tmp_path / "beir")).with_pseudo_queries(config, seed=0)
    made = texts.queries[texts.n_real :]
    assert len(made) == 3 * len(PASSAGES)
    for query in made:
        [position] = query.positives
        words = iter(PASSAGES[position].split())
        assert all(word in words for word in query.text.split()), "in the passage's order"
        assert 1 <= len(query.text.split()) <= 4
    assert made == texts.queries[texts.n_real :]


# --- clusters


def test_a_query_with_negatives_is_asked_with_those_alone(tmp_path, tokenizer):
    rows = [{"query": QUERIES[0], "positives": PASSAGES[:1], "negatives": PASSAGES[2:]}]
    clusters = dataset(read(write_lines(tmp_path / "l.jsonl", rows)), tokenizer)
    for cluster in (clusters[i] for i in range(len(clusters))):
        [(_, candidates)] = texts_of(cluster, tokenizer)
        assert candidates[0] == PASSAGES[0]
        assert set(candidates[1:]) == set(PASSAGES[2:])


def test_a_query_without_negatives_is_asked_with_its_neighbours(tmp_path, tokenizer):
    """Neighbours by BM25 share the encoded passages; each one's own queries are asked too, unless the phase is grouped."""
    texts = read(write_collection(tmp_path / "beir"))
    seen = set()
    for cluster in dataset(texts, tokenizer, passages_per_cluster=4):
        for prompt, candidates in texts_of(cluster, tokenizer):
            asked = next(i for i, q in enumerate(QUERIES) if prompt == tokenizer.prompt(SYSTEM_INSTRUCTION, INSTRUCTION, q))
            assert candidates[0] == PASSAGES[asked]
            assert sorted(candidates) == sorted(PASSAGES)
            seen.add(len(cluster.prompts))
    assert seen == {2}
    assert {len(c.prompts) for c in dataset(texts, tokenizer, passages_per_cluster=4, grouped=True)} == {1}


def repeated_lines(folder: Path) -> Path:
    """One positive a line, once more with white space and as a negative."""
    rows = [
        *({"query": QUERIES[0], "positives": [PASSAGES[i]]} for i in (0, 2)),
        {"query": f"{QUERIES[0]}\n", "positives": [f" {PASSAGES[0]}"]},
        *({"query": text, "positives": [text]} for text in PASSAGES),
    ]
    return write_lines(folder / "repeated.jsonl", rows)


def repeated_lines_with_negatives(folder: Path) -> Path:
    rows = [{"query": QUERIES[0], "positives": [PASSAGES[i]], "negatives": [PASSAGES[2 - i], PASSAGES[3]]} for i in (0, 2)]
    return write_lines(folder / "negatives.jsonl", rows)


def repeated_ids(folder: Path) -> Path:
    """A BEIR folder in which two passages and the query have two ids, and no query id knows all."""
    beir = write_collection(folder / "beir")
    for name, rows in (("corpus", [(8, PASSAGES[0]), (9, PASSAGES[2])]), ("queries", [(7, QUERIES[0])])):
        with (beir / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"_id": row_id, "text": text}) + "\n" for row_id, text in rows)
    with (beir / "qrels" / "train.tsv").open("a", encoding="utf-8") as file:
        file.write("7\t9\t1\n")
    return beir


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("write", [repeated_lines, repeated_lines_with_negatives, repeated_ids])
def test_another_passage_that_answers_is_no_negative(tmp_path, tokenizer, write, grouped):
    """Whatever the path: lines that repeat a query, negatives that other lines bring, the same texts under other ids."""
    n_asked = 0
    clusters = dataset(read(write(tmp_path)), tokenizer, passages_per_cluster=4, steps=20, grouped=grouped)
    for cluster in (clusters[i] for i in range(len(clusters))):
        for prompt, candidates in texts_of(cluster, tokenizer):
            if prompt == tokenizer.prompt(SYSTEM_INSTRUCTION, INSTRUCTION, QUERIES[0]):
                assert candidates[0] in (PASSAGES[0], PASSAGES[2])
                assert not {PASSAGES[0], PASSAGES[2]} & set(candidates[1:])
                assert PASSAGES[3] in candidates[1:]
                n_asked += 1
    assert n_asked


def test_neighbours_are_not_used_up_by_positives(tmp_path, tokenizer):
    """However many passages answer a query, it is asked with some that do not."""
    positives = [f"{QUERIES[0]} {n}" for n in range(2 * N_NEIGHBOURS)]
    rows = [{"query": QUERIES[0], "positives": positives}, {"query": QUERIES[1], "positives": ["Otters do not."]}]
    source = Source.build(read(write_lines(tmp_path / "l.jsonl", rows)), seed=0)
    assert source.neighbours[0] == [len(positives)]


def test_pseudo_queries_fill_up_and_take_places(tmp_path, tokenizer):
    config = PseudoQueryConfig(per_passage=2, min_words=2, max_words=3)
    texts = read(write_collection(tmp_path / "beir")).with_pseudo_queries(config, seed=0)
    real = [tokenizer.prompt(SYSTEM_INSTRUCTION, INSTRUCTION, query) for query in QUERIES]
    sizes = {"passages_per_cluster": 4, "queries_per_passage": 2, "steps": 20}
    for rate, expected in ((0.0, {2}), (1.0, {0})):
        clusters = list(dataset(texts, tokenizer, pseudo_rate=rate, **sizes))
        # A passage with one question and two spans, all of which can be asked.
        assert {len(cluster.prompts) for cluster in clusters} == {8}
        assert {sum(prompt in real for prompt in cluster.prompts) for cluster in clusters} == expected


def test_every_example_is_seen_once_an_epoch(tmp_path, tokenizer):
    rows = [{"query": f"question {i}", "positives": ["yes"], "negatives": ["no"]} for i in range(7)]
    texts = read(write_lines(tmp_path / "l.jsonl", rows))
    clusters = dataset(texts, tokenizer, clusters_per_step=2, steps=None, epochs=2)
    assert (clusters.n_steps, len(clusters)) == (7, 14)
    prompts_seen = [tuple(cluster.prompts[0]) for cluster in clusters]
    assert len(set(prompts_seen[:7])) == len(set(prompts_seen[7:])) == 7
    assert prompts_seen[:7] != prompts_seen[7:]


def test_a_cluster_depends_on_its_number_only(tmp_path, tokenizer):
    texts = read(write_collection(tmp_path / "beir"))
    first, second = dataset(texts, tokenizer), dataset(texts, tokenizer)
    assert [first[i] for i in (5, 2)] == [second[i] for i in (5, 2)]


def test_texts_are_cut_as_the_reranker_cuts_them(tmp_path, tokenizer):
    long = "the otter swims and swims " * 30
    texts = read(write_lines(tmp_path / "l.jsonl", [{"query": long, "positives": [long], "negatives": ["no"]}]))
    [cluster] = dataset(texts, tokenizer, steps=1, max_passage_tokens=9, max_query_tokens=5)
    assert cluster.passages[0] == tokenizer.passages([prompts.passage_text(long)])[0][:9]
    assert cluster.prompts == [tokenizer.prompt(SYSTEM_INSTRUCTION, INSTRUCTION, tokenizer.truncate_query(long, 5))]


def test_a_batch_shares_what_all_prompts_begin_with(tmp_path, tokenizer):
    """With different instructions it is less; every prompt keeps a token of its own, also when all are the same."""
    texts = read(write_lines(tmp_path / "l.jsonl", examples()))
    clusters = {tuple(cluster.prompts[0]): cluster for cluster in dataset(texts, tokenizer)}
    one, other = clusters.values()
    for batch in ([one, other], [one], [one, one]):
        made = Collator(PhaseConfig(steps=1), seed=0)(batch)
        n_shared = len(made["prefix"])
        for cluster, row, last in zip(batch, made["queries"], made["last"], strict=True):
            assert made["prefix"].tolist() + row[: last + 1].tolist() == cluster.prompts[0]
        assert n_shared < min(len(cluster.prompts[0]) for cluster in batch)
        assert n_shared == len(one.prompts[0]) - 1 or batch == [one, other]


def test_distillation_needs_a_teacher_s_margins(tmp_path, tokenizer):
    other = {**examples()[0], "instruction": "Find an animal."}
    texts = read(write_lines(tmp_path / "l.jsonl", [*examples(margins=True), other]))
    with pytest.raises(SettingsError, match="1 of 3 queries of 'data' have none; make them with `kalm mine --teacher`"):
        dataset(texts, tokenizer, losses={"distillation": 1.0})
    texts = read(write_lines(tmp_path / "l.jsonl", examples(margins=True)))
    for cluster in dataset(texts, tokenizer, losses={"distillation": 1.0}):
        [margins] = cluster.margins
        assert margins[0] == 3.0
        assert sorted(margins[1:]) == sorted(-float(i) for i in range(len(margins) - 1))


# --- teachers


def test_the_weights_of_a_teacher_are_those_that_made_the_labels():
    """Gold passages drawn from the softmax of known weights give these weights back."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6000, 8, 2, generator=generator) * torch.tensor([10.0, 0.2])
    gold = torch.multinomial((features @ torch.tensor([0.1, 8.0])).softmax(1), 1, generator=generator)[:, 0]
    rows = [torch.cat((row[i : i + 1], row[:i], row[i + 1 :])) for row, i in zip(features, gold.tolist(), strict=True)]
    assert fit_conditional_logit(rows) == pytest.approx((0.1, 8.0), rel=0.1)


def test_a_run_with_a_teacher_semantic_start_and_pseudo_queries(tmp_path, bi_encoder):
    """As pico's: the parts work together, and the embeddings outlive an interruption."""
    config = TrainConfig(
        output=tmp_path / "run",
        architecture=ARCHITECTURE.model_copy(update={"token_embeddings": bi_encoder}),
        collections=(CollectionConfig(path=write_collection(tmp_path / "beir")),),
        teacher=TeacherConfig(bi_encoder=bi_encoder, max_tokens=16),
        pseudo_queries=PseudoQueryConfig(),
        phases=(PhaseConfig(steps=2, passages_per_cluster=3),),
        keep_intermediate=True,
    )
    model = train(config)
    assert len(KalmReranker.from_pretrained(model).score(QUERIES[0], PASSAGES)) == len(PASSAGES)
    assert (tmp_path / "run" / "teacher" / "beir.safetensors").is_file()


def test_tokens_start_where_their_texts_are_alike(tiny_checkpoint, bi_encoder):
    """Cosines between starts follow the bi-encoder's, after centring; rows have length 1; control tokens stay random."""
    model = SentenceTransformer(bi_encoder)
    fast = PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint)
    torch.manual_seed(0)
    starts = token_embeddings(bi_encoder, tiny_checkpoint, width=64)
    assert not set(fast.all_special_ids) & set(starts)
    rows = torch.stack(list(starts.values()))
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
    theirs = model.encode([fast.decode([i]).strip() for i in starts], convert_to_tensor=True).cpu()
    theirs = torch.nn.functional.normalize(theirs - theirs.mean(0), dim=1)
    upper = torch.triu_indices(len(rows), len(rows), 1)
    cosines = torch.stack([(x @ x.T)[upper[0], upper[1]] for x in (rows, theirs)])
    assert torch.corrcoef(cosines)[0, 1] > 0.8
