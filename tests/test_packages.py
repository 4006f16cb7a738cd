"""The thin distributions in packages/, as they are installed; `make alone` runs this beside one framework and one of them."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
from tools.packages import PACKAGES, THIN, Thin
from tools.paths import DOCS

import kalm_integrations

each_package = pytest.mark.parametrize("thin", THIN, ids=lambda thin: thin.wheel)


def python_in(page: Path) -> str:
    [lines] = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return lines


@each_package
def test_a_package_exports_what_its_adapter_exports(thin: Thin):
    """The very same objects, and none is forgotten."""
    module, adapter = import_module(thin.module), import_module(f"kalm_integrations.{thin.adapter}")
    assert module.__all__ == adapter.__all__
    assert module.__doc__
    for name in adapter.__all__:
        assert getattr(module, name) is getattr(adapter, name)


@each_package
def test_a_package_has_the_version_of_what_it_exports(thin: Thin):
    assert version(thin.name) == version("kalm-integrations") == kalm_integrations.__version__


@each_package
def test_the_lines_of_its_readme_find_the_answer(thin: Thin, tmp_path: Path):
    """In an empty folder, so that nothing is imported from here."""
    path = tmp_path / "readme.py"
    path.write_text(python_in(thin.folder / "README.md"), encoding="utf-8")
    done = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    score, text = done.stdout.rstrip().split(" ", 1)
    assert 0.5 < float(score) < 1
    assert text == "Otters live on fish and crabs."


def test_what_a_catalogue_shows_are_the_lines_of_the_readme():
    """So that what is pasted there runs."""
    assert python_in(DOCS / "catalogues.md") == python_in(PACKAGES / "kalm-haystack" / "README.md")
