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
from kalm_integrations.training.data import Cluster, ClusterDataset, Collator, Source
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


# --- reading


def test_a_beir_folder_and_its_lines_are_the_same_training_set(tmp_path):
    folder = write_collection(tmp_path / "beir")
    lines = [{"query": query, "positives": [PASSAGES[i]]} for i, query in enumerate(QUERIES)]
    from_folder, from_lines = read(folder), read(write_lines(tmp_path / "lines.jsonl", lines))
    assert from_folder.queries == from_lines.queries
    # Lines know the passages they name, a folder all.
    assert from_folder.passages == PASSAGES
    assert from_lines.passages == PASSAGES[:2]


def test_an_instruction_is_the_line_s_own_or_the_collection_s(tmp_path):
    texts = read(write_lines(tmp_path / "lines.jsonl", examples()), instruction="Find an answer.")
    assert [query.instruction for query in texts.queries] == ["Find an answer.", "Find the river."]


GOOD = {"query": "q", "positives": ["a"], "negatives": ["b"]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a line must be a JSON object, but it cannot be parsed"),
        ({"query": "q"}, "positives: Field required"),
        ({**GOOD, "positives": []}, "positives: List should have at least 1 item"),
        ({**GOOD, "query": ""}, "query: String should have at least 1 character"),
        ({**GOOD, "negative": ["c"]}, "negative: Extra inputs are not permitted"),
        ({**GOOD, "negatives": [1]}, r"negatives.0: Input should be a valid string, but got 1"),
        ({**GOOD, "negatives": ["a"]}, "a passage must be a positive or a negative, but this one is both: 'a'"),
        ({**GOOD, "positive_scores": [1.0]}, "positive_scores and negative_scores come together"),
        (
            {**GOOD, "positive_scores": [1.0], "negative_scores": [1.0, 2.0]},
            "negative_scores must be one for each of negatives, but are 2 for 1",
        ),
        ({**GOOD, "positive_scores": [float("nan")], "negative_scores": [1.0]}, "Input should be a finite number"),
    ],
)
def test_a_bad_line_is_named_with_its_file(tmp_path, line, message):
    path = tmp_path / "lines.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{line if isinstance(line, str) else json.dumps(line)}\n")
    with pytest.raises(SettingsError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:3: ")


def test_a_collection_without_a_query_or_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"must be a BEIR folder or a file of JSON lines, but .* is not there"):
        read(tmp_path / "nowhere.jsonl")
    with pytest.raises(SettingsError, match=r"a query with a relevant passage at least, but .* holds none"):
        read(write_lines(tmp_path / "empty.jsonl", []))


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


def test_another_passage_that_answers_is_no_negative(tmp_path, tokenizer):
    rows = [
        {"query": QUERIES[0], "positives": [PASSAGES[0], PASSAGES[2]]},
        *({"query": text, "positives": [text]} for text in PASSAGES),
    ]
    for cluster in dataset(read(write_lines(tmp_path / "l.jsonl", rows)), tokenizer, passages_per_cluster=4, steps=20):
        for prompt, candidates in texts_of(cluster, tokenizer):
            if prompt == tokenizer.prompt(SYSTEM_INSTRUCTION, INSTRUCTION, QUERIES[0]):
                assert len({PASSAGES[0], PASSAGES[2]} & set(candidates)) == 1


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
    texts = read(write_lines(tmp_path / "l.jsonl", [*examples(margins=True), examples()[0]]))
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
