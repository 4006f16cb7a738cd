"""Exported checkpoints and means: finite weights, the dtype that was asked for, and nothing that belongs to other weights."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tools.training_data import PASSAGES, QUERIES, configuration, trainable, weights_of
from transformers import T5Gemma2ForConditionalGeneration
from typer.testing import CliRunner

from kalm_integrations import KalmReranker
from kalm_integrations.cli import app
from kalm_integrations.core.checkpoint.opened import Checkpoint
from kalm_integrations.core.settings import Calibration
from kalm_integrations.errors import TrainingError
from kalm_integrations.evaluation.calibration import save_calibration
from kalm_integrations.training.exporting import average_checkpoints, export_checkpoint
from kalm_integrations.training.trainer import train

SMALL = 1e-5
"""Changes that bfloat16 cannot express beside weights of ordinary size."""


@pytest.fixture
def start(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own, in bfloat16 as the published ones are."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "start")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return folder


def changed(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() * (1 + SMALL) for name, tensor in trainable(folder).weights().items()}


# --- what belongs to other weights


def test_the_calibration_of_the_start_is_left_out_and_the_rest_stays(start, other_checkpoint, tmp_path, caplog):
    fields = {"instruction": "Find the rule.", "max_query_tokens": 64, "note": "é"}
    (start / "kalm_reranker.json").write_text(json.dumps(fields), encoding="utf-8")
    save_calibration(start, Calibration(temperature=2.0, bias=0.5))
    exported = export_checkpoint(start, trainable(start).weights(), tmp_path / "exported")
    assert json.loads((exported / "kalm_reranker.json").read_text(encoding="utf-8")) == fields
    [line] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.endswith(f"kalm calibrate DATA --model {exported} --save")
    # The start keeps its own, and so does one that is averaged.
    assert "calibration" in json.loads((start / "kalm_reranker.json").read_text(encoding="utf-8"))
    mean = average_checkpoints([str(start), str(other_checkpoint)], tmp_path / "mean")
    assert json.loads((mean / "kalm_reranker.json").read_text(encoding="utf-8")) == fields
    assert Checkpoint.open(start).defaults.calibration is not None


def test_defaults_without_a_calibration_are_copied_as_they_are(start, tmp_path, caplog):
    (start / "kalm_reranker.json").write_text('{ "max_query_tokens":64 }')
    exported = export_checkpoint(start, trainable(start).weights(), tmp_path / "exported")
    assert (exported / "kalm_reranker.json").read_text() == '{ "max_query_tokens":64 }'
    assert not caplog.records


def test_licences_go_with_the_weights_and_the_start_s_card_does_not(start, tmp_path, lines):
    for name in ("LICENSE", "LICENSE.gemma", "NOTICE.txt", "README.md"):
        (start / name).write_text(f"{name} of the start")
    exported = train(configuration(tmp_path / "run", lines, model=str(start), phase={"steps": 1}))
    for name in ("LICENSE", "LICENSE.gemma", "NOTICE.txt"):
        assert (exported / name).read_text() == f"{name} of the start"
    assert "of the start" not in (exported / "README.md").read_text()


# --- what is not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_not_exported(start, tmp_path, value):
    target = shutil.copytree(start, tmp_path / "target")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    names = Checkpoint.open(start).text_names()
    weights = {name: tensor.detach().clone() for name, tensor in trainable(start).weights().items()}
    weights[names[-1]].view(-1)[-1] = value
    with pytest.raises(TrainingError, match=f"must consist of finite numbers, but NaN or infinity is in {names[-1]} of the w"):
        export_checkpoint(start, weights, target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["start", "target"]


def test_an_error_names_a_few_tensors_and_counts_the_others(start, tmp_path):
    weights = {name: torch.full_like(tensor, float("nan")) for name, tensor in trainable(start).weights().items()}
    with pytest.raises(TrainingError, match=rf"is in [^,]+, [^,]+, [^,]+ and {len(weights) - 3} more of the weights"):
        export_checkpoint(start, weights, tmp_path / "exported")


def test_numbers_that_only_bfloat16_makes_infinite_are_found(start, tmp_path):
    name = Checkpoint.open(start).text_names()[0]
    weights = {name: torch.full_like(trainable(start).weights()[name], torch.finfo(torch.float32).max)}
    with pytest.raises(TrainingError, match="NaN or infinity"):
        export_checkpoint(start, weights, tmp_path / "exported", "bfloat16")
    assert not (tmp_path / "exported").exists()


def test_a_checkpoint_that_is_not_finite_is_not_averaged(start, other_checkpoint, tmp_path):
    broken = shutil.copytree(other_checkpoint, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    name = Checkpoint.open(broken).text_names()[3]
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    result = CliRunner().invoke(app, ["average", str(start), str(broken), "--output", str(tmp_path / "mean")])
    assert result.exit_code == 2
    assert f"NaN or infinity is in {name} of '{broken}', so leave it out" in result.stderr
    assert not (tmp_path / "mean").exists()


# --- the dtype


def test_float32_keeps_a_change_that_bfloat16_loses(start, tmp_path):
    weights = changed(start)
    exact = export_checkpoint(start, weights, tmp_path / "exact")
    rounded = export_checkpoint(start, weights, tmp_path / "rounded", "bfloat16")
    before = weights_of(start)
    for name, tensor in weights.items():
        assert torch.equal(weights_of(exact)[name], tensor)
        assert torch.equal(weights_of(rounded)[name], before[name])
    # Half the size for the text; what else is in the file is as it was.
    others = before.keys() - weights.keys()
    assert others
    assert all(torch.equal(weights_of(exact)[name], before[name]) for name in others)
    sizes = [sum(weights_of(folder)[name].nbytes for name in weights) for folder in (exact, rounded)]
    assert sizes[0] == 2 * sizes[1]


def test_a_float32_export_is_another_checkpoint_for_the_runtime(start, tmp_path):
    """Its scores are those of the trained weights, and encodings of the bfloat16 one are stale for it."""
    weights = {name: tensor.detach() * 1.001 for name, tensor in trainable(start).weights().items()}
    folders = [export_checkpoint(start, weights, tmp_path / dtype, dtype) for dtype in ("float32", "bfloat16")]
    exact, rounded = (KalmReranker.from_pretrained(folder) for folder in folders)
    assert exact.fingerprint != rounded.fingerprint
    assert exact.score(QUERIES[0], PASSAGES) != rounded.score(QUERIES[0], PASSAGES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_an_export_in_its_dtype(start, tmp_path, dtype):
    weights = changed(start)
    model = T5Gemma2ForConditionalGeneration.from_pretrained(export_checkpoint(start, weights, tmp_path / "exported", dtype))
    loaded = {name.replace("text_model.", ""): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in weights.items():
        assert torch.equal(loaded[name], tensor.to(getattr(torch, dtype))), name


def test_the_dtype_is_a_setting_of_the_run_and_of_the_mean(start, lines, tmp_path):
    trained = train(configuration(tmp_path / "run", lines, model=str(start), phase={"steps": 1}, export_dtype="bfloat16"))
    names = Checkpoint.open(start).text_names()
    assert {weights_of(trained)[name].dtype for name in names} == {torch.bfloat16}
    for options, dtype in (([], torch.float32), (["--dtype", "bfloat16"], torch.bfloat16)):
        output = tmp_path / f"mean-{len(options)}"
        result = CliRunner().invoke(app, ["average", str(start), str(trained), "--output", str(output), *options])
        assert result.exit_code == 0
        assert {weights_of(output)[name].dtype for name in names} == {dtype}
