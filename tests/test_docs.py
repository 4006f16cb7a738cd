"""README and documentation: the Python in them runs, and the links in them lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from markdown_it import MarkdownIt
from tools.paths import ROOT

from kalm_integrations.core.passages.encoding import EncodedPassage
from kalm_integrations.core.sizes import n_pooled_states

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "tasks").glob("*.md"))]
PACKAGES = sorted((ROOT / "packages").glob("*/README.md"))
"""tests/test_packages.py runs the Python in these."""

NOT_RUN = re.compile(r"<!-- not run: \S.* -->\s*$")
"""A comment above a block that cannot run offline; it gives the reason."""


TAB = re.compile(r'=== "(.+)"$', re.MULTILINE)
"""The line above the content of a tab, which is indented."""


class Block(NamedTuple):
    line: int
    code: str
    is_run: bool


def tabs(page: Path) -> list[str]:
    """The titles of a page's tabs; one empty title, if it has none."""
    return list(dict.fromkeys(TAB.findall(page.read_text(encoding="utf-8")))) or [""]


def read(page: Path, tab: str) -> str:
    """What a reader sees who has chosen the tabs of one title: all on its line, nothing indented by a tab."""
    shown = []
    title = None
    for line in page.read_text(encoding="utf-8").splitlines():
        heading = TAB.match(line)
        if heading is not None:
            title = heading[1]
        elif line and not line.startswith("    "):
            title = None
        hidden = heading is not None or title not in (None, tab)
        shown.append("" if hidden else line if title is None else line[4:])
    return "\n".join(shown)


def python_blocks(page: Path, tab: str) -> list[Block]:
    tokens = MarkdownIt().parse(read(page, tab))
    blocks = []
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type == "fence" and token.info.split()[:1] == ["python"]:
            is_marked = before is not None and before.type == "html_block" and NOT_RUN.search(before.content)
            blocks.append(Block(token.map[0] + 1, token.content, not is_marked))
    return blocks


def script(blocks: list[Block]) -> str:
    """The blocks as one script, each on the lines that it has in its page, so that a traceback points there."""
    lines: list[str] = []
    for block in blocks:
        lines += [""] * (block.line - len(lines)) + block.code.splitlines()
    return "\n".join(lines)


def links(page: Path) -> list[str]:
    tokens = MarkdownIt().enable("table").parse("\n".join(read(page, tab) for tab in tabs(page)))
    inline = [child for token in tokens for child in token.children or ()]
    return [str(token.attrGet("href") or token.attrGet("src")) for token in inline if token.type in ("link_open", "image")]


READERS = [(page, tab) for page in PAGES for tab in tabs(page) if python_blocks(page, tab)]


@pytest.mark.parametrize(("page", "tab"), READERS, ids=[" ".join([page.name, tab]).strip() for page, tab in READERS])
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


@pytest.mark.parametrize("page", [*PAGES, *PACKAGES], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files(page: Path):
    """`mkdocs build --strict` checks anchors too, but neither the README nor what lies outside docs/."""
    targets = {link.split("#")[0] for link in links(page) if not re.match(r"[a-z]+:|#", link)}
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_length_table_is_right():
    """The characters that docs/encodings.md names are what the format takes."""
    widths = {"Nano": 640, "Small": 1152, "Large": 2560}
    text = (ROOT / "docs" / "encodings.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (\d+)" + r" \| ([\d,]+)" * 5 + r" \|$", text, re.MULTILINE)
    assert len(rows) == 12
    for name, ratio, *lengths in rows:
        states = torch.zeros(n_pooled_states(512, int(ratio)), widths[name])
        for codec, length in zip(("fp16", "int8", "rot4", "rot3", "rot2"), lengths, strict=True):
            encoding = EncodedPassage(states, 512, int(ratio), "0" * 32, "0" * 32, codec)
            assert len(encoding.to_metadata()) == int(length.replace(",", ""))
