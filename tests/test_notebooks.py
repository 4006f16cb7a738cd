"""The notebooks run from the first cell to the last, and what they show is what lies in the repository."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mkdocs.config import load_config
from mkdocs.structure.files import Files
from tools import notebooks
from tools.paths import DOCS, ROOT
from tools.site_notebooks import on_files

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
SHARE, DECIMALS, COUNT = 0.03, 0.02, 1
"""By how much a number may differ, as a share and at least: CPUs round differently, so that a candidate here and there changes
places with its neighbour."""
MAX_BYTES = 3_000_000


def is_close(before: str, after: str) -> bool:
    """Zero is a promise where things are counted."""
    old, new = (float(number.replace(",", "")) for number in (before, after))
    is_counted = "." not in before
    if is_counted and 0 in (old, new):
        return old == new
    return abs(new - old) <= max(COUNT if is_counted else DECIMALS, SHARE * abs(old))


def words(text: str) -> list[str]:
    return NUMBER.sub(" # ", text).split()


@pytest.fixture(params=notebooks.NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_a_run_shows_what_is_committed(path: Path, tmp_path: Path):
    """In a new folder; times are another each time, all else is not."""
    committed = notebooks.read(path)
    fresh = notebooks.run(committed, tmp_path)
    for old, new in zip(notebooks.code_cells(committed), notebooks.code_cells(fresh), strict=True):
        assert notebooks.kinds(new) == notebooks.kinds(old), old.source
        if not notebooks.is_timed(old):
            before, after = notebooks.text(old), notebooks.text(new)
            assert words(after) == words(before), old.source
            pairs = zip(NUMBER.findall(before), NUMBER.findall(after), strict=True)
            assert [pair for pair in pairs if not is_close(*pair)] == [], old.source


def test_outputs_are_committed_and_hold_nothing_but_results(path: Path):
    """Each cell was run, in order; run `python -m tools.notebooks` in tests/ if this fails."""
    notebook = notebooks.read(path)
    cells = notebooks.code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert notebooks.problems(notebook) == []
    assert "image/png" in [kind for cell in cells for kind in notebooks.kinds(cell)]
    assert notebook.metadata == notebooks.METADATA


def test_the_last_cell_switches_to_a_model_for_production(path: Path):
    assert '"nano"' in notebooks.read(path).cells[-1].source


def test_the_documentation_links_every_notebook():
    assert notebooks.NOTEBOOKS
    page = (DOCS / "notebooks.md").read_text(encoding="utf-8")
    linked = re.findall(r"/notebooks/([\w-]+\.ipynb)\)", page)
    assert sorted(linked) == [path.name for path in notebooks.NOTEBOOKS]


def test_the_site_gets_a_copy_of_every_notebook():
    files = on_files(Files([]), load_config(str(ROOT / "mkdocs.yml")))
    assert [file.dest_uri for file in files] == [f"notebooks/{path.name}" for path in notebooks.NOTEBOOKS]
    assert all(file.inclusion.is_included() for file in files)


def test_the_folder_is_small():
    assert sum(path.stat().st_size for path in notebooks.NOTEBOOKS) < MAX_BYTES
