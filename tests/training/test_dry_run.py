"""What a dry run says is what the run then does, and it leaves nothing."""

from __future__ import annotations

import json
import math

import pytest
from tools.training_data import PASSAGES, configuration, examples, write_collection

from kalm_integrations.errors import SettingsError
from kalm_integrations.training.config import DevConfig, LoraConfig, PhaseConfig
from kalm_integrations.training.dry_run import N_TIMED, forecast
from kalm_integrations.training.trainer import train


def test_it_says_what_the_run_does(tmp_path, lines):
    """Examples, steps and disk as the run has them afterwards; two phases, a new model and a dev collection."""
    phases = (
        PhaseConfig(epochs=3, clusters_per_step=1, accumulated_steps=2, passages_per_cluster=3, compression_ratios=(1,)),
        PhaseConfig(steps=20, passages_per_cluster=3, compression_ratios=(1,), max_passage_tokens=9),
    )
    dev = DevConfig(path=write_collection(tmp_path / "dev"), split="train", every_steps=8)
    config = configuration(tmp_path / "run", lines, phases=phases, dev=dev, export_dtype="bfloat16", keep_intermediate=True)
    before = sorted(tmp_path.rglob("*"))
    told = forecast(config)
    assert sorted(tmp_path.rglob("*")) == before
    assert told.collections == {"lines": (len(examples()), len(PASSAGES))}
    assert [(phase.n_examples, phase.n_steps, phase.clusters_per_step) for phase in told.phases] == [(2, 3, 2), (2, 20, 2)]
    assert [phase.n_timed for phase in told.phases] == [2, N_TIMED]
    assert all(phase.seconds >= phase.n_steps * phase.step_seconds > 0 for phase in told.phases)
    # Evaluated at the start, at 8, 16 and 20.
    assert told.phases[1].evaluation_seconds == pytest.approx(2 * told.phases[0].evaluation_seconds)
    assert [line.partition(" are cut")[0] for line in told.cuts] == ["phase 2: 4 of 4 passages of lines"]
    model = train(config)
    log = json.loads((tmp_path / "run" / "phase0" / "trainer_state.json").read_text())
    assert log["max_steps"] == told.phases[0].n_steps
    kept = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.suffix == ".safetensors")
    assert told.kept_bytes == pytest.approx(kept, rel=0.05)
    assert told.peak_bytes > told.kept_bytes
    assert (model / "model.safetensors").is_file()


def test_lora_trains_fewer_parameters(tmp_path, lines, tiny_checkpoint):
    config = configuration(tmp_path / "run", lines, model=str(tiny_checkpoint), lora=LoraConfig(rank=2), phase={"steps": 2})
    told = forecast(config)
    assert told.n_trained < told.n_parameters
    assert told.phases[0].n_steps == 2
    assert math.isfinite(told.phases[0].seconds)


def test_it_refuses_what_the_run_would_refuse(tmp_path, lines):
    with pytest.raises(SettingsError, match="distillation"):
        forecast(configuration(tmp_path / "run", lines, phase={"losses": {"distillation": 1.0}}))
    assert not (tmp_path / "run").exists()
