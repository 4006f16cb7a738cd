"""The model card: what it tells, and that it tells nothing about the machine."""

from __future__ import annotations

import json
import shutil

import pytest
from huggingface_hub import ModelCard
from tools.training_data import PASSAGES, QUERIES, configuration, write_collection
from typer.testing import CliRunner

from kalm_integrations import __version__
from kalm_integrations.cli import app
from kalm_integrations.core.checkpoint.locate import ALIASES
from kalm_integrations.training.card import CardFacts, Figure, TrainedOn, base_of, stated_licence, write_card
from kalm_integrations.training.config import CardConfig, DevConfig, LoraConfig, TrainConfig
from kalm_integrations.training.trainer import train


def section(card: str, name: str) -> str:
    return card.partition(f"\n## {name}\n")[2].partition("\n## ")[0].strip()


def test_a_run_leaves_a_card_with_data_recipe_figures_licence_and_use(tiny_checkpoint, lines, tmp_path):
    said = CardConfig(
        name="owner/name", description="Finds otters.", license="cc-by-4.0", languages=("en", "de"), datasets=("owner/otters",)
    )
    dev = DevConfig(path=write_collection(tmp_path / "held-out"), split="train")
    settings = {"model": str(tiny_checkpoint), "lora": LoraConfig(rank=2, alpha=4), "card": said, "dev": dev}
    folder = train(configuration(tmp_path / "run", lines, phase={"steps": 2}, **settings))
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert str(tiny_checkpoint.parent) not in text
    data = ModelCard(text).data
    assert (data.license, data.language, data.datasets) == ("cc-by-4.0", ["en", "de"], ["owner/otters"])
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("kalm-integrations", "text-ranking", None)
    assert "reranker" in data.tags
    assert text.partition("\n---\n\n")[2].startswith("# owner/name\n\nFinds otters.\n\n")
    made = (
        f"The weights were made with kalm_integrations {__version__} from `{tiny_checkpoint.name}`, a checkpoint that is not"
    )
    assert made in text
    assert section(text, "Data").splitlines()[2:] == [f"| lines | lines.jsonl | 2 | {len(PASSAGES)} |"]
    recipe = json.loads(section(text, "Recipe").removeprefix("```json\n").removesuffix("```"))
    assert recipe["collections"][0]["path"] == "lines.jsonl"
    assert recipe["model"] == tiny_checkpoint.name
    assert recipe["lora"]["rank"] == 2
    assert recipe["phases"][0]["steps"] == 2
    assert recipe.keys().isdisjoint({"output", "card", "architecture"})
    [result] = data.eval_results
    state = json.loads((tmp_path / "run" / "phase0" / "trainer_state.json").read_text())
    before, best = state["log_history"][0]["eval_nDCG@10"], state["best_metric"]
    assert result.metric_value == round(best, 4)
    figures = section(text, "Figures").splitlines()
    assert figures[2] == f"| held-out | 4 | {len(QUERIES)} | nDCG@10 | {before:.3f} | {best:.3f} |"
    assert "The step was chosen by held-out" in figures[-1]
    assert section(text, "Licence") == "cc-by-4.0."
    # The snippet is code, once the name is that of a checkpoint.
    code = section(text, "Use").partition("```python\n")[2].partition("```")[0].replace("owner/name", str(folder))
    exec(code, {})


def test_a_card_that_was_edited_survives_another_start_of_a_finished_run(lines, tmp_path):
    config = configuration(tmp_path / "run", lines, phase={"steps": 1})
    card = train(config) / "README.md"
    assert "random weights" in card.read_text()
    assert "architecture" in section(card.read_text(), "Recipe")
    card.write_text("mine")
    train(config)
    assert card.read_text() == "mine"


def test_without_a_licence_the_card_says_so(tmp_path):
    text = write_card(tmp_path, CardFacts("mine")).read_text()
    assert section(text, "Licence").startswith("No licence was stated.")
    assert stated_licence(tmp_path) is None
    for name in ("Data", "Recipe", "Figures"):
        assert f"## {name}" not in text


def test_a_card_tells_what_it_is_given(tmp_path):
    (tmp_path / "LICENSE").touch()
    hub_id = ALIASES["nano"].hub_id
    made_from, base_models = base_of("nano")
    facts = CardFacts(
        "mine",
        made_from=made_from,
        base_models=base_models,
        license="apache-2.0",
        collections=(TrainedOn("a|b", "a.jsonl", 1200, 34567),),
        figures=(Figure("test", "MRR", 0.51239), Figure("test", "nDCG@10", 0.6, 0.5, 1000, 8)),
    )
    text = write_card(tmp_path, facts).read_text()
    data = ModelCard(text).data
    assert (data.base_model, data["base_model_relation"]) == ([hub_id], "finetune")
    assert [(result.metric_name, result.metric_value) for result in data.eval_results] == [
        ("MRR", 0.5124),
        ("nDCG@10, ratio 8", 0.6),
    ]
    assert "| a\\|b | a.jsonl | 1,200 | 34,567 |" in text
    assert "| test |  |  | MRR |  | 0.512 |" in text
    assert "| test | 8 | 1,000 | nDCG@10 | 0.500 | 0.600 |" in text
    assert section(text, "Licence") == f"apache-2.0. The licence of {made_from} applies as well. Its texts: LICENSE."
    assert stated_licence(tmp_path) == "apache-2.0"


@pytest.mark.parametrize(
    ("model", "words", "ids"),
    [
        ("pico", "`pico`, a checkpoint that is not on the hub", ()),
        ("owner/name", "[owner/name](https://huggingface.co/owner/name)", ("owner/name",)),
        ("/gone/since/base", "`base`, a checkpoint that is not on the hub", ()),
    ],
)
def test_the_base_is_named_without_its_place(model, words, ids):
    assert base_of(model) == (words, ids)


def test_a_mean_has_the_licence_on_which_its_parts_agree(tiny_checkpoint, tmp_path):
    parts = [shutil.copytree(tiny_checkpoint, tmp_path / name) for name in ("one", "two")]
    for part in parts:
        write_card(part, CardFacts(part.name, license="mit"))
    average = ["average", *map(str, parts), "--output"]
    assert CliRunner().invoke(app, [*average, str(tmp_path / "mean")]).exit_code == 0
    text = (tmp_path / "mean" / "README.md").read_text()
    assert stated_licence(tmp_path / "mean") == "mit"
    assert "the mean of the weights of `one`" in text
    assert str(tmp_path) not in text
    write_card(parts[1], CardFacts("two", license="apache-2.0"))
    assert CliRunner().invoke(app, [*average, str(tmp_path / "other")]).exit_code == 0
    assert stated_licence(tmp_path / "other") is None


def test_card_settings_are_read_from_toml(tmp_path):
    (tmp_path / "train.toml").write_text(
        'output = "run"\nexport_dtype = "bfloat16"\n[card]\nlicense = "mit"\nlanguages = ["en"]\n'
        '[[collections]]\npath = "a.jsonl"\n[[phases]]\nsteps = 1\n'
    )
    config = TrainConfig.read(tmp_path / "train.toml")
    assert (config.card.license, config.card.languages, config.export_dtype) == ("mit", ("en",), "bfloat16")
