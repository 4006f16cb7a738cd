"""What training writes: exported checkpoints and their means. Nothing that it has not made is deleted or replaced."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tools.training_data import PASSAGES, ROWS, configuration, make_batch, scores, trainable, weights_of
from typer.testing import CliRunner

from kalm_integrations.cli import app
from kalm_integrations.core.checkpoint.opened import Checkpoint
from kalm_integrations.errors import SettingsError
from kalm_integrations.training.config import LoraConfig
from kalm_integrations.training.exporting import average_checkpoints, export_checkpoint
from kalm_integrations.training.trainer import train


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
        assert torch.equal(written[name], tensor), name
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


# --- the output of a run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_does_not_go_on_with_other_settings(tmp_path, lines):
    config = configuration(tmp_path / "run", lines, phase={"steps": 1})
    first = train(config)
    # Whatever was put beside the model: a finished run is returned as it is.
    (first / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    assert train(config) == first
    with pytest.raises(SettingsError, match=r"goes on with the settings it began with, but .* holds one with other seed"):
        train(config.model_copy(update={"seed": 5}))
    assert contents(tmp_path) == before


def test_what_lies_in_the_output_of_a_run_survives(tmp_path, lines):
    """Beside what the run makes, and named alike; its own saved steps are deleted one after the other."""
    output = tmp_path / "run"
    others = [output / "notes.txt", output / "model.part" / "x", output / "start.part" / "x", output / "phases" / "x"]
    config = configuration(output, lines, phase={"steps": 4}, save_steps=1)
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    train(config)
    # Begins anew, for nothing to go on from is left.
    shutil.rmtree(output / "model")
    others += [output / "phase0" / name / "x" for name in ("checkpoint-1-best", "checkpoint-mine")]
    for path in others[-2:]:
        path.parent.mkdir()
        path.write_text("mine")
    train(config)
    assert [path.read_text() for path in others] == ["mine"] * len(others)
    saved = {path.name for path in (output / "phase0").iterdir() if path.is_dir()}
    assert saved == {"checkpoint-1-best", "checkpoint-mine"}


@pytest.mark.parametrize("name", ["model", "start", "teacher", "phase0"])
def test_a_new_run_does_not_touch_what_is_in_its_way(tmp_path, lines, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / name / "x").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(SettingsError, match=rf"needs an output folder without {name}, .*; choose another output, or move"):
        train(configuration(tmp_path / "run", lines))
    assert contents(tmp_path) == before


def test_an_output_that_belongs_to_something_else_is_refused(tmp_path, lines, tiny_checkpoint):
    output = shutil.copytree(tiny_checkpoint, tmp_path / "run")
    before = contents(tmp_path)
    with pytest.raises(SettingsError, match=r"config.json must be the record of a run, but is something else"):
        train(configuration(output, lines))
    assert contents(tmp_path) == before


def test_a_model_that_is_not_the_run_s_is_not_replaced(tmp_path, lines):
    """Somebody put a folder where an interrupted run will leave its checkpoint."""
    config = configuration(tmp_path / "run", lines, phase={"steps": 1})
    shutil.rmtree(train(config))
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "model" / "x").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(SettingsError, match=r"run/model holds 'x', which is no part of one"):
        train(config)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("base", "config.json must be the record of a run, but is something else; choose another output"),
        ("base/runs/run", "start lies in .*base, which is read; choose another folder"),
        ("link/run", "start lies in .*base, which is read; choose another folder"),
    ],
)
def test_an_output_in_the_model_s_folder_is_refused_before_any_work(tmp_path, tiny_checkpoint, output, message):
    model = shutil.copytree(tiny_checkpoint, tmp_path / "base")
    (tmp_path / "link").symlink_to(model)
    before = contents(tmp_path)
    with pytest.raises(SettingsError, match=message):
        train(configuration(tmp_path / output, tmp_path / "no-data-is-read", model=str(model)))
    assert contents(tmp_path) == before


def test_a_run_may_lie_around_its_model(tmp_path, lines, tiny_checkpoint):
    model = shutil.copytree(tiny_checkpoint, tmp_path / "base")
    (model / "notes").mkdir()
    before = contents(model)
    assert train(configuration(tmp_path, lines, model=str(model), phase={"steps": 1})) == tmp_path / "model"
    assert contents(model) == before


# --- the mean of checkpoints


def test_the_mean_of_checkpoints_has_the_mean_weights(tiny_checkpoint, other_checkpoint, tmp_path):
    models = [str(tiny_checkpoint), str(other_checkpoint), str(other_checkpoint)]
    result = CliRunner().invoke(app, ["average", *models, "--output", str(tmp_path / "mean")])
    assert result.stdout.split() == [str(tmp_path / "mean")]
    folder = tmp_path / "mean"
    first, second, mean = (dict(Checkpoint.open(f).tensors()) for f in (tiny_checkpoint, other_checkpoint, folder))
    for name in Checkpoint.open(tiny_checkpoint).text_names():
        torch.testing.assert_close(mean[name], (first[name].float() + 2 * second[name].float()) / 3)
    assert len(scores(folder)) == len(PASSAGES)


def test_checkpoints_of_different_starts_have_no_mean(tiny_checkpoint, fresh, tmp_path):
    with pytest.raises(SettingsError, match="trained from the same start"):
        average_checkpoints([str(tiny_checkpoint), str(fresh)], tmp_path / "mean")
    with pytest.raises(SettingsError, match="two checkpoints or more, but got 1"):
        average_checkpoints([str(tiny_checkpoint)], tmp_path / "mean")


def test_a_mean_replaces_a_checkpoint_and_nothing_else(tiny_checkpoint, other_checkpoint, tmp_path):
    """Not what it is made of, nor a folder of somebody's files; and it is refused before a weight is read."""
    models = [shutil.copytree(folder, tmp_path / "models" / folder.name) for folder in (tiny_checkpoint, other_checkpoint)]
    names = [str(model) for model in models]
    (tmp_path / "link").symlink_to(models[1])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("mine")
    before = contents(tmp_path)
    for model in models:
        (model / "model.safetensors").rename(model / "hidden")
    for target in ("models", f"models/{models[0].name}", f"models/{models[1].name}/mean", "link", "link/mean", "mine"):
        result = CliRunner().invoke(app, ["average", *names, "--output", str(tmp_path / target)])
        assert result.exit_code == 2
        assert "choose another folder" in result.stderr
    for model in models:
        (model / "hidden").rename(model / "model.safetensors")
    assert contents(tmp_path) == before
    target = shutil.copytree(tiny_checkpoint, tmp_path / "target")
    (target / "README.md").write_text("about it")
    average_checkpoints(names, target)
    assert contents(target).keys() == {*contents(models[0]), "README.md"}
    assert "about it" not in (target / "README.md").read_text()
    assert weights_of(target).keys() == weights_of(models[0]).keys()
    assert {path.name for path in tmp_path.iterdir()} == {"models", "link", "mine", "target"}
