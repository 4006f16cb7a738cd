"""Training data: what is read, what a cluster holds, what is mined; and the configuration's rules."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from tools.paths import DOCS
from tools.training_data import ARCHITECTURE, PASSAGES, QUERIES, examples, write_collection, write_lines
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from kalm_integrations import KalmReranker
from kalm_integrations.cli import app
from kalm_integrations.core.checkpoint import prompts
from kalm_integrations.core.checkpoint.opened import Checkpoint
from kalm_integrations.core.checkpoint.tokenization import PromptTokenizer
from kalm_integrations.core.settings import INSTRUCTION, SYSTEM_INSTRUCTION
from kalm_integrations.corpora.bm25 import BM25
from kalm_integrations.errors import SettingsError
from kalm_integrations.training.config import (
    ArchitectureConfig,
    CollectionConfig,
    LoraConfig,
    LossConfig,
    PhaseConfig,
    PseudoQueryConfig,
    TeacherConfig,
    TrainConfig,
)
from kalm_integrations.training.data import Cluster, ClusterDataset, Collator, Source
from kalm_integrations.training.distillation import fit_conditional_logit
from kalm_integrations.training.initialize import token_embeddings
from kalm_integrations.training.sources import Example, TrainingSet, read_training_set
from kalm_integrations.training.teachers import SIMILARITY_SCALE
from kalm_integrations.training.trainer import train

INSTRUCTIONS = (SYSTEM_INSTRUCTION, INSTRUCTION)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> PromptTokenizer:
    return PromptTokenizer(Checkpoint.open(tiny_checkpoint).load_tokenizer())


@pytest.fixture(scope="module")
def bert(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Makes a random bi-encoder or cross-encoder of sentence-transformers."""
    folder = tmp_path_factory.mktemp("bert")
    fast = PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint)
    torch.manual_seed(0)
    shape = {"hidden_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 400}
    for kind, model in (
        ("bi-encoder", BertModel(BertConfig(**shape))),
        ("cross-encoder", BertForSequenceClassification(BertConfig(**shape, num_labels=1))),
    ):
        model.save_pretrained(folder / f"{kind}-parts")
        fast.save_pretrained(folder / f"{kind}-parts")
    SentenceTransformer(str(folder / "bi-encoder-parts")).save_pretrained(str(folder / "bi-encoder"))
    CrossEncoder(str(folder / "cross-encoder-parts")).save_pretrained(str(folder / "cross-encoder"))
    return lambda kind: str(folder / kind)


def read(path: Path, **settings: Any) -> TrainingSet:
    return read_training_set(CollectionConfig(path=path, name="data", **settings))


def dataset(
    texts: TrainingSet, tokenizer: PromptTokenizer, clusters_per_step: int = 1, pseudo_rate: float = 0.0, **phase: Any
) -> ClusterDataset:
    settings = PhaseConfig(**{"steps": 8, **phase})
    sources = [Source.build(texts, seed=0)]
    return ClusterDataset(sources, [None], tokenizer, INSTRUCTIONS, settings, clusters_per_step, 0, pseudo_rate)


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
            asked = next(i for i, q in enumerate(QUERIES) if prompt == tokenizer.prompt(*INSTRUCTIONS, q))
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
            if prompt == tokenizer.prompt(*INSTRUCTIONS, QUERIES[0]):
                assert len({PASSAGES[0], PASSAGES[2]} & set(candidates)) == 1


def test_pseudo_queries_fill_up_and_take_places(tmp_path, tokenizer):
    config = PseudoQueryConfig(per_passage=2, min_words=2, max_words=3)
    texts = read(write_collection(tmp_path / "beir")).with_pseudo_queries(config, seed=0)
    real = [tokenizer.prompt(*INSTRUCTIONS, query) for query in QUERIES]
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
    assert cluster.prompts == [tokenizer.prompt(*INSTRUCTIONS, tokenizer.truncate_query(long, 5))]


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


def test_a_run_with_a_teacher_semantic_start_and_pseudo_queries(tmp_path, bert):
    """As pico's: the parts work together, and the embeddings outlive an interruption."""
    config = TrainConfig(
        output=tmp_path / "run",
        architecture=ARCHITECTURE.model_copy(update={"token_embeddings": bert("bi-encoder")}),
        collections=(CollectionConfig(path=write_collection(tmp_path / "beir")),),
        teacher=TeacherConfig(bi_encoder=bert("bi-encoder"), max_tokens=16),
        pseudo_queries=PseudoQueryConfig(),
        phases=(PhaseConfig(steps=2, passages_per_cluster=3),),
    )
    model = train(config)
    assert len(KalmReranker.from_pretrained(model).score(QUERIES[0], PASSAGES)) == len(PASSAGES)
    assert (tmp_path / "run" / "teacher" / "beir.safetensors").is_file()


def test_tokens_start_where_their_texts_are_alike(tiny_checkpoint, bert):
    """Cosines between starts follow the bi-encoder's, after centring; rows have length 1; control tokens stay random."""
    model = SentenceTransformer(bert("bi-encoder"))
    fast = PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint)
    torch.manual_seed(0)
    starts = token_embeddings(bert("bi-encoder"), tiny_checkpoint, width=64)
    assert not set(fast.all_special_ids) & set(starts)
    rows = torch.stack(list(starts.values()))
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
    theirs = model.encode([fast.decode([i]).strip() for i in starts], convert_to_tensor=True).cpu()
    theirs = torch.nn.functional.normalize(theirs - theirs.mean(0), dim=1)
    upper = torch.triu_indices(len(rows), len(rows), 1)
    cosines = torch.stack([(x @ x.T)[upper[0], upper[1]] for x in (rows, theirs)])
    assert torch.corrcoef(cosines)[0, 1] > 0.8


# --- mining


def mined(tmp_path: Path, source: Path, *options: object) -> list[dict[str, Any]]:
    output = tmp_path / "mined.jsonl"
    arguments = ["mine", str(source), "--output", str(output), *map(str, options)]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    read(output)  # what is written is what the trainer reads
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_bm25_negatives_are_the_best_found_but_not_the_positives(tmp_path):
    folder = write_collection(tmp_path / "beir")
    lines = mined(tmp_path, folder, "--negatives", 1, "--depth", 1)
    assert [line["query"] for line in lines] == QUERIES
    for i, line in enumerate(lines):
        [(found, _)] = BM25(PASSAGES).search([QUERIES[i]], k=4)
        assert line["positives"] == [PASSAGES[i]]
        assert line["negatives"] == [PASSAGES[next(j for j in found if j != i)]]
    skipping = mined(tmp_path, folder, "--skip", 1, "--depth", 4)
    assert all(line["negatives"][0] not in other["negatives"] for line, other in zip(lines, skipping, strict=True))


def test_bi_encoder_negatives_are_the_nearest(tmp_path, bert):
    folder, model = write_collection(tmp_path / "beir"), bert("bi-encoder")
    lines = mined(tmp_path, folder, "--method", "bi-encoder", "--encoder", model, "--negatives", 1, "--depth", 1)
    encoder = SentenceTransformer(model)
    similarities = encoder.similarity(encoder.encode(QUERIES), encoder.encode(PASSAGES))
    for i, (line, row) in enumerate(zip(lines, similarities, strict=True)):
        row[i] = -2
        assert line["negatives"] == [PASSAGES[int(row.argmax())]]


def test_same_title_negatives_are_other_passages_of_the_document(tmp_path):
    folder = write_collection(tmp_path / "beir")
    titles = ["fish", "river", "fish", "river"]
    rows = [{"_id": f"corpus{i}", "title": t, "text": p} for i, (t, p) in enumerate(zip(titles, PASSAGES, strict=True))]
    write_lines(folder / "corpus.jsonl", rows)
    lines = mined(tmp_path, folder, "--method", "same-title")
    assert [line["negatives"] for line in lines] == [[f"fish {PASSAGES[2]}"], [f"river {PASSAGES[3]}"]]


@pytest.mark.parametrize("kind", ["kalm", "cross-encoder", "bi-encoder"])
def test_a_teacher_s_margins_are_written(tmp_path, tiny_checkpoint, bert, kind):
    model = str(tiny_checkpoint) if kind == "kalm" else bert(kind)
    lines = mined(tmp_path, write_collection(tmp_path / "beir"), "--teacher", model, "--teacher-kind", kind)
    for line in lines:
        passages = [*line["positives"], *line["negatives"]]
        if kind == "kalm":
            ranked = KalmReranker.from_pretrained(model).rank(line["query"], passages)
            expected = [p.margin for p in sorted(ranked, key=lambda p: p.index)]
        elif kind == "cross-encoder":
            pairs = [(line["query"], passage) for passage in passages]
            expected = CrossEncoder(model, activation_fn=torch.nn.Identity()).predict(pairs).tolist()
        else:
            encoder = SentenceTransformer(model)
            similarities = encoder.similarity(encoder.encode([line["query"]]), encoder.encode(passages))
            expected = [SIMILARITY_SCALE * similarity for similarity in similarities[0].tolist()]
        assert line["positive_scores"] + line["negative_scores"] == pytest.approx(expected, abs=1e-4)


def test_candidates_that_the_teacher_finds_too_good_are_left_out(tmp_path, tiny_checkpoint):
    folder = write_collection(tmp_path / "beir")
    options = ("--teacher", tiny_checkpoint, "--below-positive")
    everything = mined(tmp_path, folder, *options, -1000)
    assert all(len(line["negatives"]) == 3 for line in everything)
    margins = [s - line["positive_scores"][0] for line in everything for s in line["negative_scores"]]
    limit = sorted(margins)[len(margins) // 2]
    kept = [
        s - line["positive_scores"][0] for line in mined(tmp_path, folder, *options, -limit) for s in line["negative_scores"]
    ]
    assert sorted(kept) == pytest.approx([m for m in sorted(margins) if m <= limit + 1e-6])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--below-positive", "1"), "there is no --teacher"),
        (("--method", "bi-encoder"), "--encoder and --method bi-encoder come together"),
        (("--encoder", "x"), "--encoder and --method bi-encoder come together"),
    ],
)
def test_mining_options_that_need_each_other(tmp_path, options, message):
    result = CliRunner().invoke(app, ["mine", str(write_collection(tmp_path / "beir")), *options])
    assert result.exit_code == 2
    assert message in result.stderr


# --- the configuration


def toml(path: Path, text: str) -> TrainConfig:
    path.write_text(text)
    return TrainConfig.read(path)


MINIMAL = 'output = "run"\n[[collections]]\npath = "data/beir"\n[[phases]]\nsteps = 1\n'


def test_paths_count_from_the_file_s_folder(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    text = 'model = "models/mine"\n' + MINIMAL + '[teacher]\nbi_encoder = "models/mine"\n'
    config = toml(tmp_path / "t.toml", text)
    assert config.output == tmp_path / "run"
    assert config.collections[0].path == tmp_path / "data" / "beir"
    assert config.collections[0].name == "beir"
    assert config.model == config.teacher.bi_encoder == str(tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path / "models")
    assert TrainConfig.read(Path("../t.toml")).output.is_absolute()
    assert toml(tmp_path / "t.toml", 'model = "nano"\n' + MINIMAL).model == "nano"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output = ", "must be TOML"),
        (MINIMAL.replace("steps = 1", "step = 1"), "phases.0.step: Extra inputs are not permitted"),
        (MINIMAL.replace("steps = 1", ""), "phases.0: a phase must have either steps or epochs"),
        (MINIMAL + "epochs = 1\n", "phases.0: a phase must have either steps or epochs"),
        (MINIMAL + 'collections = ["other"]\n', "collections must be among beir, but got other"),
        (MINIMAL + '[[collections]]\npath = "beir"\n', "must have different names, but have beir, beir"),
        (MINIMAL + '[[collections]]\npath = "b"\nweight = 1.0\n', "either all collections have a weight or none"),
        (MINIMAL + "[lora]\nrank = 8\n", "there is no `model` to start from"),
        ('model = "nano"\n' + MINIMAL + "[architecture]\nn_layers = 2\n", "from `model` or from `architecture`"),
        (MINIMAL + "[phases.losses]\nnll = 0.0\n", "one of softmax, nll and distillation must be above 0"),
    ],
)
def test_a_configuration_that_breaks_a_rule_says_which(tmp_path, text, message):
    with pytest.raises(SettingsError, match=message):
        toml(tmp_path / "t.toml", text)


@pytest.mark.parametrize("name", ["training.toml", "continued.toml"])
def test_pico_s_own_configurations_are_valid(name):
    from kalm_integrations.core.checkpoint.locate import BUILT_IN

    config = TrainConfig.read(BUILT_IN / "pico" / name)
    assert all(phase.steps for phase in config.phases)


# --- the page

PAGE = (DOCS / "training.md").read_text(encoding="utf-8")


def test_every_setting_is_documented():
    sections = (ArchitectureConfig, CollectionConfig, LoraConfig, LossConfig, PhaseConfig, PseudoQueryConfig, TeacherConfig)
    names = {name for section in (*sections, TrainConfig, Example) for name in section.model_fields}
    assert {name for name in names if f"`{name}`" not in PAGE and f"[{name}]" not in PAGE} == set()


def test_the_published_recipe_of_the_page_is_valid(tmp_path):
    [text] = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    config = toml(tmp_path / "t.toml", text)
    assert [phase.losses.distillation for phase in config.phases] == [0, 0, 1]
