"""README and documentation: the Python in them runs, and the links in them lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tools.pages import PAGES, Block, blocks, links, name_of, tabs
from tools.paths import DOCS, ROOT

from kalm_integrations.core.passages.encoding import EncodedPassage
from kalm_integrations.core.sizes import n_pooled_states


def python_blocks(page: Path, tab: str) -> list[Block]:
    return [block for block in blocks(page, tab) if block.language == "python"]


def script(blocks: list[Block]) -> str:
    """The blocks as one script, each on the lines that it has in its page, so that a traceback points there."""
    lines: list[str] = []
    for block in blocks:
        lines += [""] * (block.line - len(lines)) + block.code.splitlines()
    return "\n".join(lines)


PACKAGES = sorted((ROOT / "packages").glob("*/README.md"))
"""tests/test_packages.py runs the Python in these."""
READERS = [(page, tab) for page in PAGES for tab in tabs(page) if python_blocks(page, tab)]


@pytest.mark.parametrize(("page", "tab"), READERS, ids=[f"{name_of(page)} {tab}".strip() for page, tab in READERS])
def test_python_blocks_run(page: Path, tab: str, tmp_path: Path):
    """The blocks that a reader sees run from top to bottom in a new process; those marked as not run compile."""
    blocks = python_blocks(page, tab)
    for block in blocks:
        compile(block.code, f"{page}:{block.line}", "exec")
    # Not named after the page: a script called haystack.py would be what it imports.
    path = tmp_path / "run_page.py"
    path.write_text(script([block for block in blocks if block.is_run]), encoding="utf-8")
    done = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_blocks_in_tabs_are_found(tmp_path: Path):
    """A page of tabs is no page without code, and each tab has its own and what stands outside of tabs."""
    page = tmp_path / "page.md"
    tab = '=== "{}"\n\n    ```python\n    {} = 1\n    ```\n\n'
    page.write_text(f"{tab.format('One', 'x')}{tab.format('Two', 'y')}Text\n\n```python\nz = 2\n```\n", encoding="utf-8")
    found = {title: [(block.line, block.code) for block in python_blocks(page, title)] for title in tabs(page)}
    assert found == {"One": [(3, "x = 1\n"), (15, "z = 2\n")], "Two": [(9, "y = 1\n"), (15, "z = 2\n")]}


@pytest.mark.parametrize("page", [*PAGES, *PACKAGES], ids=name_of)
def test_relative_links_lead_to_files(page: Path):
    """`mkdocs build --strict` checks anchors too, but neither the README nor what lies outside docs/."""
    targets = {link.split("#")[0] for link in links(page) if not re.match(r"[a-z]+:|#", link)}
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_length_table_is_right():
    """The characters that docs/encodings.md names are what the format takes."""
    widths = {"Nano": 640, "Small": 1152, "Large": 2560}
    text = (DOCS / "encodings.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (\d+)" + r" \| ([\d,]+)" * 5 + r" \|$", text, re.MULTILINE)
    assert len(rows) == 12
    for name, ratio, *lengths in rows:
        states = torch.zeros(n_pooled_states(512, int(ratio)), widths[name])
        for codec, length in zip(("fp16", "int8", "rot4", "rot3", "rot2"), lengths, strict=True):
            encoding = EncodedPassage(states, 512, int(ratio), "0" * 32, "0" * 32, codec)
            assert len(encoding.to_metadata()) == int(length.replace(",", ""))
