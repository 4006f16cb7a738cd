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

TAB = re.compile(r'=== ".+"$')
"""The title of a tab, whose content is indented below it."""


class Block(NamedTuple):
    """A fenced block of a page."""

    line: int
    """Lines of the page before its first line of code."""
    language: str
    code: str
    is_run: bool


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, those in tabs included."""
    tokens = tokens_of(page)
    found = []
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type == "fence":
            is_marked = before is not None and before.type == "html_block" and NOT_RUN.search(before.content)
            language = (token.info.split() or [""])[0]
            found.append(Block(token.map[0] + 1, language, token.content, not is_marked))
    return found


def inline(page: Path) -> Iterator[Token]:
    """Yield what stands in running text: links, images, code and words."""
    return (child for token in tokens_of(page) for child in token.children or ())


def links(page: Path) -> list[str]:
    """Return where the links and images of a page lead."""
    return [
        str(token.attrGet("href") or token.attrGet("src")) for token in inline(page) if token.type in ("link_open", "image")
    ]


def tokens_of(page: Path) -> list[Token]:
    return MarkdownIt().enable("table").parse(_without_tabs(page.read_text(encoding="utf-8")))


def _without_tabs(text: str) -> str:
    """Return a page of as many lines in which the content of tabs is not indented, as Markdown alone would read it as code."""
    lines, inside = [], False
    for line in text.splitlines():
        if TAB.match(line):
            inside = True
            lines.append("")
            continue
        inside = inside and (not line or line.startswith("    "))
        lines.append(line.removeprefix("    ") if inside else line)
    return "\n".join(lines)
