"""README, documentation and notebooks: code fits a page, pictures have words, and links are sound."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree import ElementTree as ET

import pytest
from tools import pictures
from tools.pages import PAGES, blocks, inline, links, name_of, tabs
from tools.paths import DOCS, ROOT

WIDTH = 80
"""Columns of code that a page of 1,280 pixels shows without a scroll bar."""

DATA = ("json", "text")
"""Languages of blocks that show data, some of which cannot be broken."""

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SVG = "{http://www.w3.org/2000/svg}"
PLOTS = sorted(DOCS.rglob("*.svg"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_is_at_most_80_columns_wide(page: Path):
    code = [block for tab in tabs(page) for block in blocks(page, tab) if block.language not in DATA]
    lines = [(block.line + at, line) for block in code for at, line in enumerate(block.code.splitlines(), 1)]
    assert not [(at, line) for at, line in lines if len(line) > WIDTH]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_code_of_notebooks_is_at_most_80_columns_wide(notebook: Path):
    """Text cells are wrapped by what shows them."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    lines = [line for cell in cells if cell["cell_type"] == "code" for line in "".join(cell["source"]).splitlines()]
    assert not [line for line in lines if len(line) > WIDTH]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pictures_have_alternative_text(page: Path):
    """A sentence of what the picture shows, and not the name of its file."""
    texts = [token.content for token in inline(page) if token.type == "image"]
    assert all(len(text.split()) >= 5 for text in texts), texts


def test_some_pages_have_pictures():
    """The test above would pass if it found none."""
    assert sum(token.type == "image" for page in PAGES for token in inline(page)) >= 8


@pytest.mark.parametrize("plot", PLOTS, ids=name_of)
def test_pictures_are_sound(plot: Path):
    """A picture is sound XML, and a part of it is drawn."""
    root = ET.parse(plot).getroot()
    assert root.tag == f"{SVG}svg"
    assert any(True for tag in ("path", "rect") for _ in root.iter(f"{SVG}{tag}"))


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures_are_those_of_the_figures(name: str):
    drawn = (pictures.FIGURES / f"{name}.svg").read_text(encoding="utf-8")
    assert drawn == pictures.PICTURES[name](), "run, in tests/: python -m tools.pictures"


def test_table_of_the_home_page_is_that_of_the_figures():
    assert pictures.HOME.read_text(encoding="utf-8") == pictures.updated_home(), "run, in tests/: python -m tools.pictures"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_elsewhere_are_well_formed(page: Path):
    """They use https and name a host. Whether the host answers is not asked: tests have no network."""
    outside = [urlsplit(link) for link in links(page) if re.match(r"[a-z]+:", link)]
    assert not [link.geturl() for link in outside if link.scheme != "https" or not re.fullmatch(r"[\w.-]+\.\w+", link.netloc)]
