"""Makes `manuals`, a collection that `pico` is trained on: sections of the manuals of free software.

    apt-get download postgresql-doc-15 python3.11-doc \\
        python-{astropy,dask,django,pandas,scipy,skimage,sklearn,sqlalchemy,statsmodels,sympy}-doc
    for package in *.deb; do dpkg -x $package unpacked; done
    pip install beautifulsoup4 lxml
    python tests/tools/manuals.py unpacked/usr/share/doc data/manuals

A passage is the prose of a section, its query the section's heading, or its first sentence where the heading is a name.
The packages are Debian 12's, under the licences of PostgreSQL and Python, BSD and MIT.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from bs4 import BeautifulSoup, Tag

MAX_PAGES, MAX_SECTIONS = 1400, 1800
"""Of each manual, so that none outweighs the others."""
MIN_SECTION_WORDS, MIN_WORDS, MAX_WORDS = 45, 40, 260
MIN_HEADING_WORDS, MIN_SENTENCE_WORDS, MAX_QUERY_WORDS = 3, 5, 25
MIN_LETTERS = 0.88
"""Share of letters and spaces: less is code or formulas."""
MAX_TITLE = 80

NO_PROSE = ["pre", "table", "script", "style", "nav", "footer", "code.sig"]
NO_PROSE_CLASSES = (
    "div.highlight, div.sphinxsidebar, div.related, div.math, span.math, .navheader, .navfooter, .toctree-wrapper, .headerlink"
)
MAIN = "div[role=main], main, div.body, div.sect1, div.refentry, div.chapter, article"
HEADINGS = ("h1", "h2", "h3", "h4", "h5")


class Section(NamedTuple):
    """A passage with its title (may be empty) and its query."""

    title: str
    query: str
    text: str


def read_page(path: Path) -> list[Section]:
    """Return the sections of an HTML page that are prose and have a query."""
    soup = BeautifulSoup(path.read_bytes(), "lxml")
    for tag in soup(NO_PROSE):
        tag.decompose()
    for tag in soup.select(NO_PROSE_CLASSES):
        tag.decompose()
    main = soup.select_one(MAIN) or soup.body
    if main is None:
        return []
    title = re.split(r" [—–|] ", _clean(soup.title.get_text()))[0] if soup.title else ""
    parts = (_section(title, heading, paragraphs) for heading, paragraphs in _parts(title, main))
    return [section for section in parts if section is not None]


def _parts(title: str, main: Tag) -> Iterator[tuple[str, list[str]]]:
    """Yield headings, or signatures, with the paragraphs below them."""
    heading, paragraphs = title, []
    for tag in main.find_all([*HEADINGS, "p", "li", "dt"]):
        if tag.name in HEADINGS or (tag.name == "dt" and "sig" in (tag.get("class") or [])):
            yield heading, paragraphs
            heading, paragraphs = "f()" if tag.name == "dt" else _clean(tag.get_text(" ")), []
        elif tag.name == "p" or (tag.name == "li" and not tag.find("p")):
            text = _clean(tag.get_text(" "))
            if text:
                paragraphs.append(text)
    yield heading, paragraphs


def _section(title: str, heading: str, paragraphs: list[str]) -> Section | None:
    if sum(len(paragraph.split()) for paragraph in paragraphs) < MIN_SECTION_WORDS:
        return None
    query, body = heading, paragraphs
    if heading.lower() == title.lower() or len(title) >= MAX_TITLE:
        title = ""
    if len(heading.split()) < MIN_HEADING_WORDS or re.search(r"[_().]", heading):
        first, *rest = re.split(r"(?<=[.!?]) ", paragraphs[0], maxsplit=1)
        if not MIN_SENTENCE_WORDS <= len(first.split()) <= MAX_QUERY_WORDS:
            return None
        title, query, body = "", first.rstrip("."), [*rest, *paragraphs[1:]]
    words = " ".join(body).split()
    text = " ".join(words[:MAX_WORDS])
    is_prose = len(words) >= MIN_WORDS and sum(c.isalpha() or c == " " for c in text) >= MIN_LETTERS * len(text)
    if not is_prose or not MIN_HEADING_WORDS <= len(query.split()) <= MAX_QUERY_WORDS:
        return None
    return Section(title, re.sub(r"^[\d.]+\s*", "", query), text)


def _clean(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("¶", " ").replace("\uf0c1", " ")).strip()


def main(manuals: Path, output: Path) -> None:
    """Write the collection in BEIR's layout."""
    draw = random.Random(0)
    sections: list[Section] = []
    beginnings: set[str] = set()
    with ProcessPoolExecutor() as pool:
        for folder in sorted(manuals.iterdir()):
            pages = sorted(folder.rglob("*.html"))
            draw.shuffle(pages)
            own = []
            for found in pool.map(read_page, pages[:MAX_PAGES], chunksize=20):
                for section in found:
                    beginning = section.text[:120].lower()
                    if beginning not in beginnings:
                        beginnings.add(beginning)
                        own.append(section)
            draw.shuffle(own)
            sections += own[:MAX_SECTIONS]
    (output / "qrels").mkdir(parents=True)
    passages = [{"_id": f"m{i}", "title": section.title, "text": section.text} for i, section in enumerate(sections)]
    queries = [{"_id": f"q{i}", "text": section.query} for i, section in enumerate(sections)]
    for name, rows in (("corpus", passages), ("queries", queries)):
        (output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judgements = "".join(f"q{i}\tm{i}\t1\n" for i in range(len(sections)))
    (output / "qrels" / "train.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judgements}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
