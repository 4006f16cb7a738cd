"""The configuration of a run: its rules, its paths, and the page that documents it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tools.paths import DOCS

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
from kalm_integrations.training.sources import Example


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
    [text] = re.findall(r"```toml\n(.*?)```", PAGE.partition("## The published recipe")[2], re.DOTALL)
    config = toml(tmp_path / "t.toml", text)
    assert [phase.losses.distillation for phase in config.phases] == [0, 0, 1]
