"""Training runs the runtime's own code, starts where it can learn, and goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kalm_integrations import KalmReranker
from kalm_integrations.core import prompts
from kalm_integrations.core.checkpoint import Checkpoint
from kalm_integrations.core.runtime import pad_token_ids
from kalm_integrations.core.tokenization import PromptTokenizer
from kalm_integrations.training import trainer
from kalm_integrations.training.config import ArchitectureConfig, CollectionConfig, PhaseConfig, TrainConfig
from kalm_integrations.training.data import prompt_prefix
from kalm_integrations.training.initialize import create_checkpoint
from kalm_integrations.training.model import TrainableReranker
from kalm_integrations.training.tokenizer import train_tokenizer

PASSAGES = ["Otters live on fish and crabs.", "The Rhine rises in the Alps.", "Who lives on fish? Seals do.", "Snow falls."]
QUERIES = ["What do otters eat?", "Where does the Rhine rise?"]
ARCHITECTURE = ArchitectureConfig(vocabulary_size=350, hidden_width=32, mlp_width=32, n_layers=2, head_width=16)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fresh")
    train_tokenizer([*PASSAGES, *QUERIES] * 10, ARCHITECTURE.vocabulary_size, folder)
    create_checkpoint(ARCHITECTURE, folder, seed=0)
    return folder


@pytest.mark.parametrize("ratio", [1, 4])
def test_training_margins_are_those_of_the_reranker(fresh, ratio):
    """What the loss is computed from, with shared prefixes and padding, is what `rank` returns."""
    tokenizer = PromptTokenizer(Checkpoint.open(fresh).load_tokenizer())
    prefix = prompt_prefix(tokenizer)
    passages = tokenizer.passages([prompts.passage_text(text) for text in PASSAGES])
    whole = [tokenizer.prompt(prompts.SYSTEM_INSTRUCTION, prompts.INSTRUCTION, query) for query in QUERIES]
    assert all(ids[: len(prefix)] == prefix for ids in whole)
    rests = [ids[len(prefix) :] for ids in whole]
    output = TrainableReranker(fresh, tokenizer.answer_ids)(
        passages=pad_token_ids(passages),
        n_tokens=torch.tensor([len(ids) for ids in passages]),
        prefix=torch.tensor(prefix),
        queries=pad_token_ids(rests)[None],
        last=torch.tensor([[len(ids) - 1 for ids in rests]]),
        relevant=torch.tensor([[0, 1]]),
        compression_ratio=ratio,
    )
    reranker = KalmReranker.from_pretrained(fresh, compression_ratio=ratio)
    for query, margins in zip(QUERIES, output["margins"], strict=True):
        ranked = sorted(reranker.rank(query, PASSAGES), key=lambda passage: passage.index)
        torch.testing.assert_close(margins, torch.tensor([p.margin for p in ranked]), atol=1e-4, rtol=1e-4)


def test_mirror_turns_a_query_token_from_itself_to_the_passage(fresh):
    """In the first decoder layer a token's query meets the key of its own kind in a passage far better than its own."""
    weights = load_file(fresh / "model.safetensors")
    sign = 1 + weights["model.encoder.norm.weight"]
    query = weights["model.decoder.layers.0.self_attn.q_proj.weight"][: ARCHITECTURE.head_width]
    key = weights["model.decoder.layers.0.self_attn.k_proj.weight"]
    states = torch.randn(500, ARCHITECTURE.hidden_width, generator=torch.Generator().manual_seed(0))
    to_itself = ((states @ query.T) * (states @ key.T)).sum(1)
    to_passage = ((states @ query.T) * ((states * sign) @ key.T)).sum(1)
    assert set(sign.tolist()) == {1.0, -1.0}
    assert to_passage.mean() > 10 * to_itself.mean().abs()


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", PASSAGES), ("queries", QUERIES)):
        rows = [json.dumps({"_id": f"{name}{i}", "text": text}) for i, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nqueries0\tcorpus0\t1\nqueries1\tcorpus1\t1\n")
    return folder


class _KilledError(Exception):
    pass


def test_a_killed_run_goes_on_as_if_nothing_had_happened(collection, tmp_path, monkeypatch):
    """Killed between two saved steps and started again, a run ends with the weights of one that was left alone."""

    def configuration(name: str) -> TrainConfig:
        phase = PhaseConfig(steps=6, passages_per_cluster=3, compression_ratios=(1, 2), warmup_steps=1)
        return TrainConfig(
            output=tmp_path / name,
            architecture=ARCHITECTURE,
            collections=(CollectionConfig(path=collection),),
            phases=(phase,),
            save_steps=2,
        )

    alone = trainer.train(configuration("alone"))
    forward, steps = TrainableReranker.forward, []

    def forward_until_killed(self, **batch):
        steps.append(batch)
        if len(steps) == 6:
            raise _KilledError
        return forward(self, **batch)

    monkeypatch.setattr(TrainableReranker, "forward", forward_until_killed)
    with pytest.raises(_KilledError):
        trainer.train(configuration("killed"))
    monkeypatch.setattr(TrainableReranker, "forward", forward)
    resumed = trainer.train(configuration("killed"))
    expected, got = load_file(alone / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, msg=name)
    start = load_file(tmp_path / "alone" / "start" / "model.safetensors")
    name = "model.decoder.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(start[name].bfloat16(), expected[name]), "six steps must have moved the weights"


def test_a_trained_checkpoint_reranks(collection, tmp_path):
    config = TrainConfig(
        output=tmp_path / "run",
        architecture=ARCHITECTURE,
        collections=(CollectionConfig(path=collection),),
        phases=(PhaseConfig(steps=1, passages_per_cluster=2),),
    )
    scores = KalmReranker.from_pretrained(trainer.train(config)).score(QUERIES[0], PASSAGES)
    assert len(scores) == len(PASSAGES)
