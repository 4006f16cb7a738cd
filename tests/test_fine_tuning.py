"""Fine-tuning for code search: its data, its program at toy size, and its place on the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from benchmarks import fine_tuning, fine_tuning_page
from tools import code_search
from tools.code_search import Function

from kalm_integrations.corpora.beir import Collection
from kalm_integrations.training.config import TrainConfig

MODULE = '''
class HTTPPool:
    def add_host(self, name):
        """Add a host to the pool. It is asked last.

        More about it.
        """
        host = Host(name)

        self.hosts.append(host)

    def drop(self):
        """Drop `host` from the pool here."""
        self.hosts.pop()
        return self

    def count(self):
        """Return the number of hosts."""
        return len(self.hosts)
'''


def test_functions_are_read_with_their_first_sentence_and_without_their_docstring(tmp_path):
    """Markup in the sentence, or a body of one line, leaves a function out."""
    (tmp_path / "pool.py").write_text(MODULE)
    [function] = code_search.read_file(tmp_path / "pool.py", ["net", "pool"])
    code = "def add_host(self, name):\n    host = Host(name)\n    self.hosts.append(host)"
    assert function == Function("Add a host to the pool", "net pool HTTP Pool add host", code)
    (tmp_path / "template.py").write_text("def {{ name }}():")
    assert code_search.read_file(tmp_path / "template.py", []) == []


def test_what_was_seen_is_left_out():
    one = Function("Add a host", "a", "def add(x):\n    return x")
    same_query = Function("add a host", "b", "def insert(y):\n    return y")
    same_code = Function("Put a host", "c", "def put(x):\n  return x")
    assert code_search.without_repeats([one, same_query, same_code], set()) == [one]


def test_names_are_cut_for_the_first_stage_only(tmp_path):
    """The model reads texts as they are."""
    functions = [Function("use the rootNode", "", "def root_node(): ..."), Function("something else", "", "def other(): ...")]
    code_search.write(tmp_path, functions, "test")
    task = fine_tuning.Task.read(tmp_path, 2, cuts_names=True)
    assert task.collection.passages["p0"] == "def root_node(): ..."
    assert task.candidates["q0"].query == "use the rootNode"
    assert task.candidates["q0"].scores[0] > task.candidates["q0"].scores[1] == 0


def test_a_collection_is_written(tmp_path):
    code_search.write(tmp_path / "c", [Function("a query", "a title", "def f(): ...")], "dev")
    collection = Collection.read(tmp_path / "c", "dev")
    assert collection.passages == {"p0": "a title def f(): ..."}
    assert collection.qrels == {"q0": {"p0": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fine-tuning")
    words = ("red", "green", "blue", "grey")
    functions = [Function(f"paint the {w} wall", f"paint {w}", f"def paint_{w}(wall):\n    wall.fill({w})") for w in words]
    for split in ("train", "test"):
        code_search.write(made / split, functions, split)
    return made


def test_recipes_are_trained_and_compared_with_the_start(folder, tmp_path):
    """Figures that are there are not made again."""
    output = tmp_path / "figures.json"
    options = ["--queries", "3", "--steps", "1", "--output", str(output), "--runs", str(tmp_path / "runs"), "--recipes"]
    inputs = [str(folder), str(folder / "test")]
    fine_tuning.main([*inputs, *options, "adamw"])
    first = json.loads(output.read_text())
    fine_tuning.main([*inputs, *options, "adamw", "mean"])
    measured = json.loads(output.read_text())
    assert measured["recipes"]["adamw"] == first["recipes"]["adamw"]
    assert list(measured["recipes"]) == ["adamw", "mean"]
    code = measured["tasks"]["code"]
    assert (code["queries"], code["recall"]) == (3, 1)
    assert list(measured["tasks"]) == ["code", "names cut", "squad"]
    row = measured["recipes"]["mean"]["code"]["alone"]
    assert row["to start"]["mean"] == pytest.approx(row["mean"] - code["means"]["alone"], abs=1e-4)
    assert row["to bm25"]["mean"] == pytest.approx(row["mean"] - code["means"]["bm25"], abs=1e-4)
    assert "mean of `pico` and the first" in fine_tuning_page.tables(measured)


def test_the_page_shows_what_was_measured():
    assert fine_tuning_page.updated() == fine_tuning_page.PAGE.read_text(encoding="utf-8"), (
        "run, from tests/: python -m benchmarks.fine_tuning_page"
    )


@pytest.mark.parametrize("task", fine_tuning_page.FIRST_STAGES)
def test_the_gain_of_the_first_recipe_is_beyond_chance(task):
    """As the page says, alone and summed, against the start and against either BM25."""
    measured = json.loads(fine_tuning.OUTPUT.read_text())
    first = measured["recipes"]["muon"][task]
    assert measured["tasks"][task]["queries"] >= 500
    assert all(first[system][other]["low"] > 0 for system in ("alone", "summed") for other in ("to start", "to bm25"))


def test_the_page_s_settings_are_the_first_recipe_s(tmp_path):
    page = fine_tuning_page.PAGE.read_text(encoding="utf-8")
    text = re.findall(r"```toml\n(.*?)```", page.partition("## A fine-tune that pays")[2], re.DOTALL)[0]
    (tmp_path / "training.toml").write_text(text)
    recipe = fine_tuning.RECIPES["muon"]
    steps = json.loads(fine_tuning.OUTPUT.read_text())["steps"]
    expected = fine_tuning.configuration(recipe, tmp_path / "run", tmp_path / "code" / "train", steps)
    assert TrainConfig.read(tmp_path / "training.toml") == expected
