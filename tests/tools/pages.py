"""The README and the pages of the documentation, as Markdown tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tools.paths import DOCS, ROOT

PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

NOT_RUN = re.compile(r"<!-- not run: \S.* -->\s*$")
"""A comment above a block that cannot run offline; it gives the reason."""

TAB = re.compile(r'=== "(.+)"$', re.MULTILINE)
"""The line above the content of a tab, which is indented."""


class Block(NamedTuple):
    """A fenced block of a page."""

    line: int
    """Lines of the page before its first line of code."""
    language: str
    code: str
    is_run: bool


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tabs(page: Path) -> list[str]:
    """Return the titles of a page's tabs; one empty title, if it has none."""
    return list(dict.fromkeys(TAB.findall(page.read_text(encoding="utf-8")))) or [""]


def read(page: Path, tab: str) -> str:
    """Return what a reader sees who has chosen the tabs of one title: all on its line, nothing indented by a tab."""
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


def blocks(page: Path, tab: str) -> list[Block]:
    """Return the fenced blocks that a reader of one tab sees."""
    tokens = tokens_of(page, tab)
    found = []
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type == "fence":
            is_marked = before is not None and before.type == "html_block" and NOT_RUN.search(before.content)
            language = (token.info.split() or [""])[0]
            found.append(Block(token.map[0] + 1, language, token.content, not is_marked))
    return found


def inline(page: Path) -> Iterator[Token]:
    """Yield what stands in the running text of all tabs: links, images, code and words."""
    return (child for tab in tabs(page) for token in tokens_of(page, tab) for child in token.children or ())


def links(page: Path) -> list[str]:
    """Return where the links and images of a page lead."""
    return [
        str(token.attrGet("href") or token.attrGet("src")) for token in inline(page) if token.type in ("link_open", "image")
    ]


def tokens_of(page: Path, tab: str) -> list[Token]:
    return MarkdownIt().enable("table").parse(read(page, tab))
