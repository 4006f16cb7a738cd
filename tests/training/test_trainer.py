"""Training runs the runtime's own code, starts where it can learn, and goes on where it stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tools.checkpoints import make_checkpoint
from tools.parity import Parity
from tools.training_data import ARCHITECTURE, PASSAGES, QUERIES, examples, make_batch, write_collection, write_lines
from typer.testing import CliRunner

from kalm_integrations import KalmReranker
from kalm_integrations.cli import app
from kalm_integrations.core.checkpoint.opened import Checkpoint
from kalm_integrations.core.checkpoint.tokenization import PromptTokenizer
from kalm_integrations.errors import SettingsError
from kalm_integrations.training.config import CollectionConfig, LoraConfig, LossConfig, PhaseConfig, TrainConfig
from kalm_integrations.training.exporting import average_checkpoints, export_checkpoint
from kalm_integrations.training.initialize import create_checkpoint
from kalm_integrations.training.losses import combined_loss, soft_labels
from kalm_integrations.training.model import TrainableReranker
from kalm_integrations.training.tokenizer import train_tokenizer
from kalm_integrations.training.trainer import train

ROWS = [(QUERIES[0], None, [0, 1, 2, 3]), (QUERIES[1], "Find the river.", [1, 3]), (QUERIES[1], None, [1, 0, 3])]
"""Queries with instructions and candidates; the rows differ in all of them."""


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new model, as a run from nothing starts with."""
    folder = tmp_path_factory.mktemp("fresh")
    train_tokenizer([*PASSAGES, *QUERIES] * 10, ARCHITECTURE.vocabulary_size, folder)
    create_checkpoint(ARCHITECTURE, folder, seed=0)
    return folder


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "lines.jsonl", examples())


def trainable(folder: Path, **settings: Any) -> TrainableReranker:
    return TrainableReranker(folder, PromptTokenizer(Checkpoint.open(folder).load_tokenizer()).answer_ids, **settings)


def scores(folder: Path, ratio: int = 1) -> list[float]:
    return KalmReranker.from_pretrained(folder, compression_ratio=ratio).score(QUERIES[0], PASSAGES)


# --- the forward pass


@pytest.mark.parametrize("checkpointed", [None, 2])
@pytest.mark.parametrize("which", ["fresh", "tiny_checkpoint"])
def test_training_margins_are_those_of_the_reranker(request, which, checkpointed):
    """What the loss is computed from is what `rank` returns: over prompts with one prefix, instructions, padding, ratios."""
    folder = request.getfixturevalue(which)
    ratios = (1, 4, 32)
    model = trainable(folder, checkpointed_passages=checkpointed)
    margins = model(**make_batch(folder, ROWS, ratios))["margins"]
    for ratio, of_ratio in zip(ratios, margins, strict=True):
        reranker = KalmReranker.from_pretrained(folder, compression_ratio=ratio)
        for (query, instruction, candidates), row in zip(ROWS, of_ratio, strict=True):
            ranked = reranker.rank(query, [PASSAGES[i] for i in candidates], instruction=instruction)
            expected = [p.margin for p in sorted(ranked, key=lambda passage: passage.index)]
            torch.testing.assert_close(row[: len(candidates)], torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_the_loss_of_a_set_of_ratios_is_the_sum_over_them(fresh):
    model = trainable(fresh)
    ratios = (2, 8, 32)
    apart = [model(**make_batch(fresh, ROWS, (ratio,)))["loss"].item() for ratio in ratios]
    together = model(**make_batch(fresh, ROWS, ratios))["loss"].item()
    assert together == pytest.approx(sum(apart), rel=1e-5)


def test_gradient_checkpointing_changes_no_gradient(tiny_checkpoint):
    gradients = []
    for checkpointed in (None, 1, 3):
        model = trainable(tiny_checkpoint, checkpointed_passages=checkpointed)
        model(**make_batch(tiny_checkpoint, ROWS, (1, 4)))["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


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


# --- losses

NAN = float("nan")
MARGINS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, 0.0]])
IS_PAIR = torch.tensor([[True, True, True], [True, True, False]])
NO_TEACHER = torch.full((2, 3), NAN)


def loss_of(teacher: torch.Tensor = NO_TEACHER, teacher_weight: float = 0.0, **weights: float) -> float:
    labels = soft_labels(teacher, teacher_weight)
    return float(combined_loss(MARGINS, IS_PAIR, labels, teacher, LossConfig(**weights)))


def test_softmax_is_over_a_query_s_own_passages():
    of_first = -MARGINS[0].log_softmax(0)[0]
    of_second = -MARGINS[1, :2].log_softmax(0)[0]
    assert loss_of(softmax=1) == pytest.approx(float((of_first + of_second) / 2))
    assert loss_of(softmax=3) == pytest.approx(3 * loss_of(softmax=1))


def test_nll_is_that_of_yes_for_the_gold_passage_and_of_no_for_the_others():
    yes, no = -MARGINS[:, 0].sigmoid().log(), -(-MARGINS[:, 1:]).sigmoid().log()
    assert loss_of(nll=1) == pytest.approx(float((yes.sum() + no[0].sum() + no[1, 0]) / 5))


def test_distillation_is_least_where_the_margins_are_the_teacher_s():
    own = torch.where(IS_PAIR, MARGINS, NAN)
    entropy = torch.distributions.Bernoulli(logits=MARGINS[IS_PAIR]).entropy().mean()
    assert loss_of(own, distillation=1) == pytest.approx(float(entropy))
    assert loss_of(own + 1, distillation=1) != pytest.approx(float(entropy))


def test_a_teacher_has_its_share_of_the_labels_of_queries_that_it_knows():
    teacher = torch.tensor([[1.0, 3.0, NAN], [NAN, NAN, NAN]])
    labels = soft_labels(teacher, 0.4)
    softmax = torch.tensor([1.0, 3.0]).softmax(0)
    torch.testing.assert_close(labels[0], torch.tensor([0.6 + 0.4 * softmax[0], 0.4 * softmax[1], 0.0]))
    assert labels[1].tolist() == [1, 0, 0]


# --- runs


def configuration(output: Path, data: Path, **settings: Any) -> TrainConfig:
    phase = {
        "steps": 6,
        "clusters_per_step": 2,
        "passages_per_cluster": 3,
        "compression_ratios": (1, 2),
        "warmup_steps": 1,
        **settings.pop("phase", {}),
    }
    if "model" not in settings:
        settings["architecture"] = ARCHITECTURE
    defaults = {"save_steps": 2, "logging_steps": 1, "phases": (PhaseConfig(**phase),)}
    return TrainConfig(output=output, collections=(CollectionConfig(path=data),), **{**defaults, **settings})


def losses(output: Path, phase: int = 0) -> list[tuple[int, float]]:
    history = json.loads((output / f"phase{phase}" / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


TOML = """
output = "{output}"
save_steps = 3
logging_steps = 1
[architecture]
vocabulary_size = 350
hidden_width = 32
mlp_width = 32
n_layers = 2
head_width = 16
[[collections]]
path = "beir"
[[phases]]
steps = 4
compression_ratios = [1, 2]
[[phases]]
steps = 400
compression_ratios = [1, 2]
"""


def test_a_killed_run_goes_on_along_the_same_curve(tmp_path):
    """A process that is killed in its second phase, and started again, logs the losses of one that was left alone."""
    write_collection(tmp_path / "beir")

    def start(name: str, steps: int) -> subprocess.Popen[bytes]:
        path = tmp_path / f"{name}.toml"
        path.write_text(TOML.format(output=name).replace("steps = 400", f"steps = {steps}"))
        command = [sys.executable, "-m", "kalm_integrations.cli", "train", str(path)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    # Long enough to be alive when the first steps of the second phase have been saved.
    n_steps = 20
    process = start("killed", n_steps)
    phase = tmp_path / "killed" / "phase1"
    deadline = time.monotonic() + 120
    while not list(phase.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (phase / "model.safetensors").exists(), "it was killed too late"
    process.communicate()
    # What a kill in the middle of saving leaves behind.
    (phase / f"checkpoint-{n_steps + 1}").mkdir()
    for name in ("killed", "alone"):
        process = start(name, n_steps)
        errors = process.communicate()[1].decode()
        assert process.returncode == 0, errors
    assert "incomplete" in (errors if name == "killed" else "incomplete")
    killed, alone = tmp_path / "killed", tmp_path / "alone"
    assert [step for step, _ in losses(alone, 1)] == list(range(1, n_steps + 1))
    assert losses(killed, 0) == losses(alone, 0)
    for got, expected in zip(losses(killed, 1), losses(alone, 1), strict=True):
        assert got == pytest.approx(expected, rel=1e-4)
    for name, tensor in weights_of(alone / "model").items():
        torch.testing.assert_close(weights_of(killed / "model")[name], tensor, msg=name)


def test_processes_share_a_run(tmp_path):
    """As on several GPUs: started twice by torchrun, it is one run, with one export and one line of output."""
    write_collection(tmp_path / "beir")
    (tmp_path / "t.toml").write_text(TOML.format(output="run").replace("steps = 400", "epochs = 8"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "kalm_integrations.cli"]
    done = subprocess.run([*launcher, "train", str(tmp_path / "t.toml")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "run" / "model")]
    # Two examples, two clusters a step on each of two devices: an epoch is half a step.
    assert [len(losses(tmp_path / "run", phase)) for phase in (0, 1)] == [4, 4]
    assert len(scores(tmp_path / "run" / "model")) == len(PASSAGES)


def test_a_run_does_not_go_on_with_other_settings(tmp_path, lines):
    config = configuration(tmp_path / "run", lines, phase={"steps": 1})
    first = train(config)
    assert train(config) == first, "a finished run is returned"
    with pytest.raises(SettingsError, match=r"goes on with the settings it began with, but .* holds one with other seed"):
        train(config.model_copy(update={"seed": 5}))


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, alpha=8)])
@pytest.mark.parametrize("shards", ["5GB", "50KB"])
def test_a_trained_model_goes_on_as_a_checkpoint(tmp_path, lines, lora, shards):
    """From one file or many: the export is what was trained, loads in transformers, and keeps what is no text."""
    start = make_checkpoint(tmp_path / "start", max_shard_size=shards)
    assert (start / "model.safetensors.index.json").exists() == (shards == "50KB")
    phase = {"steps": 3, "learning_rate": 1e-2}
    model = train(configuration(tmp_path / "run", lines, model=str(start), lora=lora, phase=phase))
    before, after = dict(Checkpoint.open(start).tensors()), weights_of(model)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name].bfloat16(), after[name])}
    text = set(Checkpoint.open(start).text_names())
    if lora is None:
        norms = {name for name in text - changed if "norm" in name}
        # Norm weights around .3 in bfloat16 may stay where they are for three steps.
        assert text - changed - norms == {name for name in text if name.endswith("eoi_embedding")}
    else:
        assert changed == {name for name in text if name.rpartition("_proj")[1]}
    assert changed <= text
    parity = Parity(model)
    for ratio in (1, 4):
        parity.check(QUERIES[0], PASSAGES, ratio=ratio)
    assert scores(model) != pytest.approx(scores(start), abs=1e-3)


def test_what_a_lora_run_exports_is_what_it_trained(tiny_checkpoint, tmp_path):
    model = trainable(tiny_checkpoint, lora=LoraConfig(rank=2, alpha=4))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).normal_(std=0.3)
    exported = export_checkpoint(tiny_checkpoint, model.weights(), tmp_path / "exported")
    written = weights_of(exported)
    for name, tensor in model.weights().items():
        assert torch.equal(written[name], tensor.bfloat16()), name
    # And these tensors are what the forward pass uses.
    plain = trainable(tiny_checkpoint)
    with torch.no_grad():
        for name, tensor in model.weights().items():
            plain.get_parameter(name).copy_(tensor)
    batch = make_batch(tiny_checkpoint, ROWS[:1], (1,))
    torch.testing.assert_close(model(**batch)["margins"], plain(**batch)["margins"])


def test_copies_of_the_embeddings_are_not_exported_beside_the_trained_ones(tiny_checkpoint, tmp_path):
    """Some files hold the tied head too; were it left as it was, transformers would not tie it any more."""
    start = tmp_path / "start"
    shutil.copytree(tiny_checkpoint, start)
    tensors = load_file(start / "model.safetensors")
    copies = ("lm_head.out_proj.weight", "model.decoder.embed_tokens.weight")
    both = {**tensors, **{name: tensors["model.encoder.embed_tokens.weight"].clone() for name in copies}}
    save_file(both, start / "model.safetensors", metadata={"format": "pt"})
    model = trainable(start)
    weights = {name: tensor + 1 for name, tensor in model.weights().items()}
    exported = export_checkpoint(start, weights, tmp_path / "exported")
    assert weights_of(exported).keys() == tensors.keys()


def test_lora_targets_that_are_not_there_are_named(tiny_checkpoint):
    with pytest.raises(SettingsError, match=r"lora targets must be among down_proj, .*, v_proj, but got query"):
        trainable(tiny_checkpoint, lora=LoraConfig(targets=("query",)))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_training_makes_gold_passages_score_higher(tmp_path, lines, optimizer):
    """The published way on a few lines: groups, yes and no, the sum over a set of ratios."""
    phase = {
        "steps": 30,
        "optimizer": optimizer,
        "learning_rate": 5e-3,
        "losses": {"nll": 1.0},
        "ratios_per_step": "all",
        "compression_ratios": (1, 4),
        "accumulated_steps": 2,
    }
    output = tmp_path / "run"
    model = train(configuration(output, lines, phase=phase, save_steps=100))
    curve = [loss for _, loss in losses(output)]
    assert curve[-1] < 0.5 * curve[0]
    for ratio in (1, 4):
        assert max(range(len(PASSAGES)), key=scores(model, ratio).__getitem__) == 0


def test_a_teacher_s_margins_are_learnt(tmp_path):
    """Distillation moves P(yes) towards sigmoid(margin), whatever the gold labels say."""
    rows = [{"query": QUERIES[0], "positives": PASSAGES[:1], "negatives": PASSAGES[1:]}]
    rows[0] |= {"positive_scores": [-1.5], "negative_scores": [1.5, -1.5, 1.5]}
    data = write_lines(tmp_path / "taught.jsonl", rows)
    phase = {
        "steps": 60,
        "learning_rate": 1e-2,
        "passages_per_cluster": 4,
        "compression_ratios": (1,),
        "losses": {"distillation": 1.0},
    }
    model = train(configuration(tmp_path / "run", data, phase=phase, save_steps=1000))
    target = torch.tensor([-1.5, 1.5, -1.5, 1.5]).sigmoid().tolist()
    assert scores(model) == pytest.approx(target, abs=0.1)


# --- the mean of checkpoints


def test_the_mean_of_checkpoints_has_the_mean_weights(tiny_checkpoint, other_checkpoint, tmp_path):
    models = [str(tiny_checkpoint), str(other_checkpoint), str(other_checkpoint)]
    result = CliRunner().invoke(app, ["average", *models, "--output", str(tmp_path / "mean")])
    assert result.stdout.split() == [str(tmp_path / "mean")]
    folder = tmp_path / "mean"
    first, second, mean = (dict(Checkpoint.open(f).tensors()) for f in (tiny_checkpoint, other_checkpoint, folder))
    for name in Checkpoint.open(tiny_checkpoint).text_names():
        torch.testing.assert_close(mean[name], ((first[name] + 2 * second[name]) / 3).bfloat16())
    assert len(scores(folder)) == len(PASSAGES)


def test_checkpoints_of_different_starts_have_no_mean(tiny_checkpoint, fresh, tmp_path):
    with pytest.raises(SettingsError, match="trained from the same start"):
        average_checkpoints([str(tiny_checkpoint), str(fresh)], tmp_path / "mean")
    with pytest.raises(SettingsError, match="two checkpoints or more, but got 1"):
        average_checkpoints([str(tiny_checkpoint)], tmp_path / "mean")
    with pytest.raises(SettingsError, match="another folder"):
        average_checkpoints([str(tiny_checkpoint)] * 2, tiny_checkpoint)
