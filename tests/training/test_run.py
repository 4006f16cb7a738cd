"""What a run does beside its steps: it stops when asked, evaluates, reports, and says what bites."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tools.training_data import (
    ARCHITECTURE,
    ARCHITECTURE_TOML,
    PASSAGES,
    QUERIES,
    configuration,
    examples,
    weights_of,
    write_collection,
    write_lines,
)

from kalm_integrations import KalmReranker
from kalm_integrations.core.checkpoint.locate import resolve
from kalm_integrations.core.checkpoint.opened import Checkpoint
from kalm_integrations.corpora.first_stage import order
from kalm_integrations.corpora.measures import ndcg_at_10
from kalm_integrations.errors import MissingExtraError, SettingsError, TrainingError
from kalm_integrations.training import phases
from kalm_integrations.training.callbacks import to_clock
from kalm_integrations.training.config import CollectionConfig, DevConfig, LoraConfig, PhaseConfig, TrainConfig
from kalm_integrations.training.dev import read_dev_set
from kalm_integrations.training.model import TrainableReranker
from kalm_integrations.training.output import newest_complete, saved_steps
from kalm_integrations.training.pairs import PairTokenizer
from kalm_integrations.training.trainer import train

TOML = """
output = "{output}"
save_steps = 1000
logging_steps = 1
{architecture}
[[collections]]
path = "lines.jsonl"
[[phases]]
steps = 150
passages_per_cluster = 3
compression_ratios = [1, 2]
"""


def history(output: Path, phase: int = 0) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((output / f"phase{phase}" / "trainer_state.json").read_text())["log_history"]
    return entries


def messages(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def kill_before_its_end(config: TrainConfig) -> None:
    """Train, and fail when the weights of the phase's end are to be written: the last step has been saved."""

    def fail(*_: object) -> None:
        msg = "killed"
        raise OSError(msg)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(phases, "save_file", fail)
        with pytest.raises(OSError, match="killed"):
            train(config)


# --- stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_that_was_reached(tmp_path, lines, number):
    """Nothing is lost: the same command goes on there, and ends with the weights of a run that was left alone."""

    def start(name: str) -> subprocess.Popen[str]:
        (tmp_path / f"{name}.toml").write_text(TOML.format(output=name, architecture=ARCHITECTURE_TOML))
        command = [sys.executable, "-m", "kalm_integrations", "train", str(tmp_path / f"{name}.toml")]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    process = start("stopped")
    assert process.stderr is not None
    for line in process.stderr:
        if "step 3 of 150" in line:
            break
    os.kill(process.pid, number)
    errors = process.communicate()[1]
    assert process.returncode == 128 + number, errors
    told = re.search(
        r"kalm: stopped by (\w+) after step (\d+) of 150 in phase 1 of 1, which is saved; the same command", errors
    )
    assert told is not None, errors
    assert told[1] == number.name
    [saved] = saved_steps(tmp_path / "stopped" / "phase0")
    assert saved.name == f"checkpoint-{told[2]}"
    assert not (tmp_path / "stopped" / "model").exists()
    for name in ("stopped", "alone"):
        process = start(name)
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
    assert [entry["step"] for entry in history(tmp_path / "stopped") if "loss" in entry] == list(range(1, 151))
    for name, tensor in weights_of(tmp_path / "alone" / "model").items():
        torch.testing.assert_close(weights_of(tmp_path / "stopped" / "model")[name], tensor, msg=name)


def test_a_run_that_ended_before_its_last_step_was_used_goes_on(tmp_path, lines):
    """Killed between the last step's saving and the export."""
    config = configuration(tmp_path / "run", lines, phase={"steps": 4})
    kill_before_its_end(config)
    newest = newest_complete(tmp_path / "run" / "phase0")
    assert newest is not None
    assert newest.name == "checkpoint-4"
    trained = load_file(newest / "model.safetensors")
    weights = weights_of(train(config))
    assert all(torch.equal(weights[name], tensor) for name, tensor in trained.items())


# --- numbers that are none


def test_a_run_whose_loss_is_no_number_ends_and_exports_nothing(tmp_path, lines):
    config = configuration(
        tmp_path / "run", lines, phase={"steps": 9, "learning_rate": 1e30, "optimizer": "adamw"}, save_steps=1
    )
    with pytest.raises(
        TrainingError, match=r"must be finite numbers, but those of step \d of .*phase0 are not, so the run ends"
    ):
        train(config)
    assert not (tmp_path / "run" / "model").exists()
    newest = newest_complete(tmp_path / "run" / "phase0")
    if newest is not None:
        assert all(tensor.isfinite().all() for tensor in load_file(newest / "model.safetensors").values())


# --- the seed


def test_the_seed_covers_what_lora_begins_with(tmp_path, lines, tiny_checkpoint):
    """Whatever was drawn before in the same process."""
    made = []
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        torch.rand(3)
        settings = {"model": str(tiny_checkpoint), "lora": LoraConfig(rank=2, alpha=4), "seed": seed, "phase": {"steps": 2}}
        made.append(weights_of(train(configuration(tmp_path / name, lines, **settings))))
    first, again, other = made
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_muon_trains_the_matrices_of_lora(tmp_path, lines, tiny_checkpoint):
    phase = {"steps": 3, "optimizer": "muon", "warmup_steps": 0}
    config = configuration(tmp_path / "run", lines, model=str(tiny_checkpoint), lora=LoraConfig(rank=2, alpha=4), phase=phase)
    before, after = dict(Checkpoint.open(tiny_checkpoint).tensors()), weights_of(train(config))
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert changed == {name for name in Checkpoint.open(tiny_checkpoint).text_names() if "_proj" in name}


# --- going on


def test_a_configuration_that_failed_before_its_first_step_binds_nobody(tmp_path, lines):
    broken = configuration(tmp_path / "run", lines, phase={"losses": {"distillation": 1.0}})
    with pytest.raises(SettingsError, match="distillation"):
        train(broken)
    assert (tmp_path / "run" / "start").is_dir()
    corrected = configuration(tmp_path / "run", lines, seed=3)
    alone = configuration(tmp_path / "alone", lines, seed=3)
    weights, expected = weights_of(train(corrected)), weights_of(train(alone))
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.fixture
def unfinished(tmp_path: Path, lines: Path) -> TrainConfig:
    """A run whose export is missing: it would go on."""
    config = configuration(tmp_path / "run", lines, keep_intermediate=True)
    shutil.rmtree(train(config))
    return config


def test_what_only_saves_memory_may_change(unfinished):
    phase = unfinished.phases[0].model_copy(update={"clusters_per_step": 1, "accumulated_steps": 2})
    other = {"checkpointed_passages": 1, "phases": (phase,), "save_steps": 7, "logging_steps": 3, "export_dtype": "bfloat16"}
    assert train(unfinished.model_copy(update=other)).is_dir()


@pytest.mark.parametrize(("name", "value"), [("seed", 5), ("max_grad_norm", 0.5), ("bf16", False)])
def test_what_changes_the_result_may_not_change(unfinished, name, value):
    with pytest.raises(SettingsError, match=f"goes on with the settings it began with, but .* holds one with other {name}"):
        train(unfinished.model_copy(update={name: value}))


def test_a_run_does_not_go_on_with_other_data(unfinished, lines):
    write_lines(lines, examples()[:1])
    with pytest.raises(SettingsError, match=r"goes on with the data it began with, but lines changed since .*run was begun"):
        train(unfinished)


def test_a_finished_run_says_so(tmp_path, lines, caplog):
    config = configuration(tmp_path / "run", lines)
    before = weights_of(train(config))
    write_lines(lines, examples()[:1])
    caplog.clear()
    model = train(config.model_copy(update={"export_dtype": "bfloat16"}))
    assert "run is finished, so nothing is trained and its data is not read again; export_dtype changed since" in messages(
        caplog
    )
    assert all(torch.equal(weights_of(model)[name], tensor) for name, tensor in before.items())


def test_what_only_an_unfinished_run_needs_is_deleted(tmp_path, lines):
    config = configuration(tmp_path / "run", lines)
    train(config)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "model", "phase0"}
    assert {path.name for path in (tmp_path / "run" / "phase0").iterdir()} == {"trainer_state.json"}
    train(config.model_copy(update={"output": tmp_path / "kept", "keep_intermediate": True}))
    assert (tmp_path / "kept" / "start" / "model.safetensors").is_file()
    assert (tmp_path / "kept" / "phase0" / "model.safetensors").is_file()


# --- evaluation during training


@pytest.fixture
def dev(tmp_path: Path) -> DevConfig:
    rows = [{"query": query, "positives": [PASSAGES[i]], "negatives": PASSAGES[2:]} for i, query in enumerate(QUERIES)]
    return DevConfig(path=write_lines(tmp_path / "dev.jsonl", rows), every_steps=2, compression_ratio=2)


@pytest.mark.parametrize("is_folder", [True, False])
def test_dev_is_ranked_as_in_use(tmp_path, dev, is_folder):
    """The same nDCG as the runtime's, from a BEIR folder and from lines, with several queries in a batch."""
    if is_folder:
        dev = dev.model_copy(update={"path": write_collection(tmp_path / "beir"), "split": "train", "instruction": "Find it."})
    dev_set = read_dev_set(dev)
    pico = resolve("pico")
    tokenizer = PairTokenizer.load(Checkpoint.open(pico))
    model = TrainableReranker(pico, tokenizer.tokenizer.answer_ids)
    reranker = KalmReranker.from_pretrained("pico", compression_ratio=2, storage_codec="fp32")
    rankings = {}
    for query_id, found in dev_set.candidates.items():
        passages = [dev_set.collection.passages[i] for i in found.ids]
        instruction = "Find it." if is_folder else None
        rankings[query_id] = order(found.ids, reranker.score(found.query, passages, instruction=instruction))
    expected = ndcg_at_10(dev_set.collection.qrels, rankings)
    assert len(expected) == len(QUERIES)
    assert dev_set.evaluate(model, tokenizer, bf16=False) == pytest.approx(sum(expected.values()) / len(expected), abs=1e-12)


def test_the_best_evaluation_is_kept_and_a_phase_ends_early(tmp_path, lines, dev, caplog, monkeypatch):
    """The values are made up here, so that the best one is known: after step 4, and nothing better in the next two."""
    caplog.set_level(logging.INFO, logger="kalm_integrations")
    values = iter([0.5, 0.4, 0.8, 0.7, 0.8, 0.9])
    seen = []

    def evaluate(self: Any, model: TrainableReranker, *_: Any, **__: Any) -> float:
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return next(values)

    monkeypatch.setattr("kalm_integrations.training.dev.DevSet.evaluate", evaluate)
    config = configuration(
        tmp_path / "run", lines, dev=dev.model_copy(update={"patience": 2}), phase={"steps": 11}, save_steps=3
    )
    weights = weights_of(train(config))
    assert len(seen) == 5
    assert all(torch.equal(weights[name], tensor) for name, tensor in seen[2].items() if name in weights)
    entries = [(e["step"], e["eval_nDCG@10"]) for e in history(tmp_path / "run") if "eval_nDCG@10" in e]
    assert entries == [(0, 0.5), (2, 0.4), (4, 0.8), (6, 0.7), (8, 0.8)]
    state = json.loads((tmp_path / "run" / "phase0" / "trainer_state.json").read_text())
    assert (state["best_metric"], state["best_global_step"]) == (0.8, 4)
    log = messages(caplog)
    assert "phase 1 of 1, step 2 of 11: dev nDCG@10 0.4000" in log
    assert "the last 2 evaluations brought nothing better than 0.8000: the phase ends" in log
    assert "step 4 is taken, which ranked dev best: nDCG@10 0.8000, +0.3000 to the start" in log


def test_a_run_that_makes_nothing_better_keeps_its_start(tmp_path, lines, dev, caplog, monkeypatch):
    values = iter([0.5, 0.4, 0.3, 0.2])
    monkeypatch.setattr("kalm_integrations.training.dev.DevSet.evaluate", lambda *_, **__: next(values))
    model = train(configuration(tmp_path / "run", lines, dev=dev, keep_intermediate=True))
    assert "no step ranked dev better than the start (0.5000), so the weights stay as they were" in messages(caplog)
    start = weights_of(tmp_path / "run" / "start")
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights_of(model).items())


def test_an_interrupted_run_knows_its_best_evaluation(tmp_path, lines, dev):
    """With the real evaluation: stopped behind its best step or before, it ends as the run that was left alone."""
    settings = {"dev": dev.model_copy(update={"every_steps": 1}), "save_steps": 1, "phase": {"steps": 5}}
    alone = train(configuration(tmp_path / "alone", lines, **settings))
    config = configuration(tmp_path / "run", lines, **settings)
    kill_before_its_end(config)
    weights, expected = weights_of(train(config)), weights_of(alone)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert history(tmp_path / "run")[0]["step"] == 0


def test_a_dev_collection_without_a_judged_query_is_refused(tmp_path, dev):
    folder = write_collection(tmp_path / "beir")
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n")
    with pytest.raises(SettingsError, match="must have passages and judged queries"):
        read_dev_set(dev.model_copy(update={"path": folder}))


# --- the log and reports


def test_a_short_run_has_a_log_with_rates_and_time(tmp_path, lines, caplog):
    caplog.set_level(logging.INFO, logger="kalm_integrations")
    train(configuration(tmp_path / "run", lines, logging_steps=None, phase={"steps": 20}))
    logged = re.findall(
        r"phase 1 of 1, step (\d+) of 20: loss \d+\.\d{4}, gradient norm [\d.e-]+, learning rate \d\.\d\de-\d\d, "
        r"\d:\d\d:\d\d left",
        messages(caplog),
    )
    assert logged == [str(step) for step in range(2, 21, 2)]
    assert to_clock(3909.4) == "1:05:09"


def test_what_bites_is_said_before_training(tmp_path, lines, caplog):
    caplog.set_level(logging.WARNING, logger="kalm_integrations")
    train(configuration(tmp_path / "run", lines, phase={"steps": 3, "warmup_steps": 60, "max_passage_tokens": 9}))
    log = messages(caplog)
    assert "the learning rate warms up over 60 steps, but there are 3, so it never gets to its full height" in log
    assert re.search(
        r"phase 1: \d of 4 passages of lines are cut to max_passage_tokens = 9; in use, 1024 tokens are read at a time", log
    )
    caplog.clear()
    train(configuration(tmp_path / "whole", lines, phase={"steps": 20, "warmup_steps": None}))
    assert "warms up" not in messages(caplog)
    assert "are cut" not in messages(caplog)


def test_gradients_are_scaled_down_to_what_is_asked(tmp_path, lines):
    made = [
        weights_of(train(configuration(tmp_path / str(norm), lines, max_grad_norm=norm, phase={"optimizer": "adamw"})))
        for norm in (1.0, 1e-7)
    ]
    assert any(not torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_a_run_reports_to_tensorboard(tmp_path, lines):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(configuration(tmp_path / "run", lines, report_to=("tensorboard",)))
    [events] = (tmp_path / "run").rglob("events.out.tfevents.*")
    read = EventAccumulator(str(events)).Reload()
    assert [scalar.step for scalar in read.Scalars("train/loss")] == list(range(1, 7))
    assert {"train/grad_norm", "train/learning_rate"} <= set(read.Tags()["scalars"])


def test_a_report_that_cannot_be_made_is_refused_before_any_work(tmp_path, lines):
    with pytest.raises(SettingsError, match=r"report_to must be among .*tensorboard.*, but got 'a printer'"):
        train(configuration(tmp_path / "run", lines, report_to=("a printer",)))
    with pytest.raises(MissingExtraError, match="reporting to wandb needs it installed: pip install wandb"):
        train(configuration(tmp_path / "run", lines, report_to=("wandb",)))
    assert not (tmp_path / "run").exists()


def test_an_epoch_shows_every_example_of_all_collections_once(tmp_path, lines, monkeypatch):
    """Not so many draws, in which some come twice and some not at all."""
    more = write_lines(tmp_path / "more.jsonl", [{**examples()[0], "query": f"question {i}"} for i in range(7)])
    collections = (CollectionConfig(path=lines), CollectionConfig(path=more))
    shown = []
    run = phases.PhaseTrainer.__init__

    def spy(self: Any, model: Any, dataset: Any, *args: Any, **kwargs: Any) -> None:
        shown.extend(dataset[i].prompts[0] for i in range(len(dataset)))
        run(self, model, dataset, *args, **kwargs)

    monkeypatch.setattr(phases.PhaseTrainer, "__init__", spy)
    phase = PhaseConfig(epochs=2, clusters_per_step=3, passages_per_cluster=3, compression_ratios=(1,))
    train(TrainConfig(output=tmp_path / "run", architecture=ARCHITECTURE, collections=collections, phases=(phase,)))
    counts = [shown.count(prompt) for prompt in {tuple(prompt): prompt for prompt in shown}.values()]
    assert counts == [2] * 9
