"""A run makes a checkpoint that is better at its data, and goes on where it stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tools.checkpoints import make_checkpoint
from tools.parity import Parity
from tools.training_data import (
    ARCHITECTURE_TOML,
    PASSAGES,
    QUERIES,
    configuration,
    scores,
    weights_of,
    write_collection,
    write_lines,
)

from kalm_integrations.core.checkpoint.opened import Checkpoint
from kalm_integrations.training.config import LoraConfig
from kalm_integrations.training.trainer import train


def losses(output: Path, phase: int = 0) -> list[tuple[int, float]]:
    history = json.loads((output / f"phase{phase}" / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]


TOML = """
output = "{output}"
save_steps = 3
logging_steps = 1
{architecture}
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
        path.write_text(TOML.format(output=name, architecture=ARCHITECTURE_TOML).replace("steps = 400", f"steps = {steps}"))
        command = [sys.executable, "-m", "kalm_integrations", "train", str(path)]
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
    dev = '[dev]\npath = "beir"\nsplit = "train"\nevery_steps = 3\n'
    (tmp_path / "t.toml").write_text(
        TOML.format(output="run", architecture=ARCHITECTURE_TOML).replace("steps = 400", "epochs = 8") + dev
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "kalm_integrations"]
    done = subprocess.run([*launcher, "train", str(tmp_path / "t.toml")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Gloo, which connects processes on CPUs, tells what it does before torch 2.11.
    ours = [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert ours == [str(tmp_path / "run" / "model")]
    # Two examples, two clusters a step on each of two devices: an epoch is half a step.
    assert [len(losses(tmp_path / "run", phase)) for phase in (0, 1)] == [4, 4]
    history = json.loads((tmp_path / "run" / "phase0" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_nDCG@10" in entry] == [0, 3, 4]
    assert len(scores(tmp_path / "run" / "model")) == len(PASSAGES)


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
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    text = set(Checkpoint.open(start).text_names())
    if lora is None:
        assert text - changed == {name for name in text if name.endswith("eoi_embedding")}
    else:
        assert changed == {name for name in text if name.rpartition("_proj")[1]}
    assert changed <= text
    parity = Parity(model)
    for ratio in (1, 4):
        parity.check(QUERIES[0], PASSAGES, ratio=ratio)
    assert scores(model) != pytest.approx(scores(start), abs=1e-3)


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
