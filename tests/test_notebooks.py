"""The notebooks run from the first cell to the last."""

from pathlib import Path

import jupytext
import pytest
from nbclient import NotebookClient
from tools.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs(path: Path, tmp_path: Path):
    notebook = jupytext.read(path)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute()


def test_there_are_notebooks():
    """An empty list above would pass."""
    assert NOTEBOOKS
