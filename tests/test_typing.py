"""Documented calls pass the type checkers that users run, with no plugin."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tools.paths import ROOT, TESTS

SAMPLES = sorted((TESTS / "typing").glob("sample_*.py"))

WRONG = """
from kalm_integrations import KalmReranker
from kalm_integrations.langchain import KalmRerank

KalmReranker.from_pretrained("pico", compression_rate=4)
KalmRerank(top_n="three")
KalmReranker.from_pretrained("pico").rank("query", ["a"]).mad
"""
"""Three mistakes, which a checker has to find for the samples to say anything."""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    wrong = tmp_path_factory.mktemp("typing") / "wrong.py"
    wrong.write_text(WRONG, encoding="utf-8")
    return [*SAMPLES, wrong]


def check(found: dict[str, int]) -> None:
    assert SAMPLES
    assert found.pop("wrong.py") == 3
    assert found == {}


def test_mypy_without_plugins_finds_nothing(files, tmp_path):
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = True\n", encoding="utf-8")
    done = run("mypy", "--config-file", str(tmp_path / "mypy.ini"), "--output", "json", *map(str, files))
    found: dict[str, int] = {}
    for line in done.stdout.splitlines():
        problem = json.loads(line)
        assert problem["severity"] != "error" or Path(problem["file"]).name == "wrong.py", problem
        found[Path(problem["file"]).name] = found.get(Path(problem["file"]).name, 0) + (problem["severity"] == "error")
    check(found)


def test_pyright_finds_nothing(files, tmp_path):
    project = {"typeCheckingMode": "standard", "include": [str(file) for file in files], "extraPaths": [str(ROOT)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(project), encoding="utf-8")
    options = ["--pythonpath", sys.executable, "--level", "error", "--outputjson"]
    done = run("basedpyright", "--project", str(tmp_path / "pyrightconfig.json"), *options)
    found: dict[str, int] = {}
    for problem in json.loads(done.stdout)["generalDiagnostics"]:
        name = Path(problem["file"]).name
        assert name == "wrong.py", problem
        found[name] = found.get(name, 0) + 1
    check(found)
