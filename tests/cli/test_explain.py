"""`kalm explain`: the order before and after and the sentences' scores, in the terminal, as a page and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tools.command_line import QUERY, Run, assert_fails, write_jsonl
from tools.stub_service import serve

from kalm_integrations import KalmReranker
from kalm_integrations.cli import explain_html, explain_terminal, ranking
from kalm_integrations.cli.explanation import Explained, level_of
from kalm_integrations.core.settings import DEFAULT_CODEC
from kalm_integrations.core.types import RankedPassage, Span

TEXTS = [
    "The Panthers defense gave up 308 points. It ranked sixth.",
    "Lift and drag of a wing. A wing stalls.",
    "Denver won Super Bowl 50 in 2016. So what?",
    "naïve 東京。雨です。",
]


@pytest.fixture
def expected(make_reranker: Callable[..., KalmReranker]) -> Any:
    """What the reranker says."""
    return make_reranker(storage_codec=DEFAULT_CODEC).rank(QUERY, TEXTS, spans=len(TEXTS))


@pytest.fixture
def rows() -> Path:
    """The texts, with names."""
    return write_jsonl(Path("p.jsonl"), [{"_id": f"p{i}", "text": text} for i, text in enumerate(TEXTS)])


class Page(HTMLParser):
    """A page's elements: name, attributes, and the text before the next one."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]


def test_json_is_what_the_reranker_says(run: Run, model: Any, expected: Any, rows: Path) -> None:
    printed = json.loads(run("explain", QUERY, rows, "--json", "--top-k", 3, *model).stdout)
    results = printed["results"]
    assert [(r["index"], r["score"], r["margin"]) for r in results] == [
        (passage.index, passage.score, passage.margin) for passage in expected[:3]
    ]
    assert [r["spans"] for r in results] == [[span.to_dict() for span in passage.spans] for passage in expected[:3]]
    assert [(r["rank"], r["place"], r["name"]) for r in results] == [
        (rank, passage.index + 1, f"p{passage.index}") for rank, passage in enumerate(expected[:3], 1)
    ]
    assert {r["encoding"] for r in results} == {"missing"}
    assert [r["row"] for r in results] == [{"_id": f"p{p.index}", "text": TEXTS[p.index]} for p in expected[:3]]
    ranks = {passage.index: rank for rank, passage in enumerate(expected, 1)}
    assert [(row["place"], row["rank"]) for row in printed["before"]] == [(index + 1, ranks[index]) for index in range(3)]


def test_terminal_has_a_sentence_a_line_behind_its_score(run: Run, model: Any, expected: Any, rows: Path) -> None:
    result = run("explain", QUERY, rows, "--top-k", 2, *model)
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in result.stdout
    for rank, passage in enumerate(expected[:2], 1):
        text = TEXTS[passage.index]
        for span in passage.spans:
            assert f"{span.score:.4f}  {text[span.start : span.end]}" in lines
        assert any(line.startswith(f"{rank}. p{passage.index}: score {passage.score:.4f}") for line in lines)
    assert lines[1].split()[:2] == ["1", "p0"]
    assert f"{expected[0].score:.4f}  p{expected[0].index}" in lines[1]
    assert "2 of 4 passages; encodings: 0 stored ones used, 4 made now" in result.stderr


def test_encodings_found_and_made(run: Run, model: Any, rows: Path) -> None:
    run("encode", rows, "-o", "e.jsonl", *model)
    encoded = Path("e.jsonl").read_text().splitlines()
    bad = json.dumps({"_id": "bad", "text": "Other text.", "kalm_encoding": "kalm1.x.y"})
    Path("mixed.jsonl").write_text("\n".join([encoded[0], rows.read_text().splitlines()[1], bad]))
    results = json.loads(run("explain", QUERY, "mixed.jsonl", "--json", *model).stdout)["results"]
    assert {r["name"]: r["encoding"] for r in results} == {"p0": "stored", "p1": "missing", "bad": "corrupt"}
    printed = " ".join(run("explain", QUERY, "mixed.jsonl", *model).stdout.split())
    for words in ("encoding found with the passage", "encoding made now", "is damaged"):
        assert words in printed
    page = run("explain", QUERY, "mixed.jsonl", "--html", "-", *model).stdout
    assert "1 encodings were found, 2 made now" in page


def test_the_page(run: Run, model: Any, expected: Any, rows: Path) -> None:
    result = run("explain", QUERY, rows, "--html", "out.html", "--top-k", 3, *model)
    assert (result.exit_code, result.stdout) == (0, "")
    text = Path("out.html").read_text(encoding="utf-8")
    page = Page(text)
    for name in ("header", "main", "h1", "title"):
        assert len(page.named(name)) == 1, name
    assert [article["id"] for article in page.named("article")] == ["rank-1", "rank-2", "rank-3"]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"] for link in page.named("a")} <= {f"#{name}" for name in ids}
    labels = [attributes["aria-labelledby"] for _, attributes in page.elements if "aria-labelledby" in attributes]
    assert set(labels) <= set(ids)
    titles = [mark["title"] for mark in page.named("mark") if "title" in mark]
    in_order = [sorted(passage.spans, key=lambda span: span.start) for passage in expected[:3]]
    assert [title.split(",")[0] for title in titles if title] == [
        f"score {span.score:.4f}" for spans in in_order for span in spans
    ]
    for passage in expected[:3]:
        for span in passage.spans:
            assert f"<b>{span.score:.2f}</b>{TEXTS[passage.index][span.start : span.end]}</mark>" in text
    assert "prefers-color-scheme: dark" in text
    assert not set(dict(page.elements)) & {"script", "link", "img", "iframe"}
    assert not re.search(r"url\(|https?:|@import|\ssrc=", text)
    assert "default-src 'none'" in text


HOSTILE = "</p></article><script>alert('x')</script> {query} &amp; \x00\x1b[2J \ud83d\r\n\u202e\"'<b title=\"y\">bold</b>."


def test_hostile_passages_are_text(run: Run, model: Any) -> None:
    write_jsonl(Path("p.jsonl"), [{"_id": '"><script>1</script>', "text": HOSTILE}, {"_id": "\x1b[2J\n", "text": "{facts}"}])
    query = "</title><script>alert(1)</script> {style}"
    assert run("explain", query, "p.jsonl", "--html", "out.html", *model).exit_code == 0
    page = Page(Path("out.html").read_text(encoding="utf-8"))
    assert not page.named("script")
    assert page.named("b") == [{}] * len(page.named("b"))
    shown = "".join(page.texts)
    for text in ("</p></article><script>alert('x')</script>", "{query} &amp; ��[2J �\n", '<b title="y">', "{facts}", query):
        assert text in shown
    printed = run("explain", query, "p.jsonl", *model).stdout
    assert not set(printed) & set("\x1b\x07\x00\u202e")


def test_what_is_not_read_is_said(run: Run, make_reranker: Callable[..., KalmReranker], monkeypatch: Any) -> None:
    short = make_reranker(max_passage_tokens=24)
    monkeypatch.setattr(ranking, "open_model", lambda *_, **__: short)
    Path("p.txt").write_text("One sentence. " * 20)
    [span, *_] = short.highlight(QUERY, ("One sentence. " * 20).strip())
    assert span.end < 200
    page = Page(run("explain", QUERY, "p.txt", "--html", "-").stdout)
    assert [part["class"] for part in page.named("span") if part.get("class") == "unread"] == ["unread"]
    assert "not read" in run("explain", QUERY, "p.txt").stdout


@pytest.mark.parametrize("width", [40, 80, 200])
def test_colours_add_to_the_scores(width: int) -> None:
    spans = tuple(Span(place, place + 9, score) for place, score in ((0, 0.05), (10, 0.5), (20, 0.95)))
    passage = RankedPassage(2, 0.7, 0.85, 0.7, "Sentence. Sentence. Sentence.", spans)
    one = Explained(1, passage, "p2", passage.text or "", "stored")
    console = Console(width=width, force_terminal=True, color_system="standard", highlight=False)
    with console.capture() as capture:
        console.print(explain_terminal.details(one))
    printed = capture.get()
    plain = re.sub(r"\x1b\[[\d;]*m", "", printed)
    assert max(map(len, plain.splitlines())) <= width
    assert [line.split() for line in plain.splitlines()[-3:]] == [[f"{span.score:.4f}", "Sentence."] for span in spans]
    assert (
        len({line.replace("0.0500", "").replace("0.5000", "").replace("0.9500", "") for line in printed.splitlines()[-3:]})
        == 3
    )
    assert one.move == "up 2"


def test_levels_cover_all_scores() -> None:
    assert [level_of(score) for score in (0.0, 0.19, 0.2, 0.5, 0.61, 0.8, 1.0)] == [0, 0, 1, 2, 3, 4, 4]
    assert all(f".s{level_of(score)} " in explain_html._STYLE for score in (0.0, 0.3, 0.5, 0.7, 0.9))
    assert len(explain_terminal.STYLES) == level_of(1.0) + 1


def test_a_service_explains_as_the_model_does(
    run: Run, model: Any, make_reranker: Callable[..., KalmReranker], rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KALM_API_KEY", raising=False)
    with serve(make_reranker(storage_codec=DEFAULT_CODEC)) as service:
        there, here = (
            json.loads(run("explain", QUERY, rows, "--json", *options).stdout)["results"]
            for options in (("--model", service.url), model)
        )
        service.spans = False
        assert_fails(run("explain", QUERY, rows, "--model", service.url), "upgrade kalm-integrations")
    for far, near in zip(there, here, strict=True):
        assert [(s["start"], s["end"]) for s in far["spans"]] == [(s["start"], s["end"]) for s in near["spans"]]
        assert [s["score"] for s in far["spans"]] == pytest.approx([s["score"] for s in near["spans"]], abs=1e-6)
        assert (far["rank"], far["place"], far["encoding"]) == (near["rank"], near["place"], near["encoding"])


def test_mistakes_and_nothing(run: Run, model: Any, rows: Path) -> None:
    assert_fails(run("explain", " ", rows, *model), "a word at least")
    assert_fails(run("explain", QUERY, rows, "--html", "o.html", "--json", *model), "both --html and --json")
    assert_fails(run("explain", QUERY, rows, "--html", "no/o.html", *model), "existing folder")
    assert run("explain", QUERY, *model).stdout == ""
    empty = run("explain", QUERY, "--html", "o.html", *model)
    assert (empty.exit_code, Page(Path("o.html").read_text()).named("article")) == (0, [])
    assert json.loads(run("explain", QUERY, "--json", *model).stdout)["results"] == []
