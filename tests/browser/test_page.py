"""The page of `kalm ui` in a browser: asking, what is shown, and what goes wrong."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from tools.services import in_process

from kalm_integrations import KalmReranker
from kalm_integrations.corpora.candidates import read_candidates
from kalm_integrations.corpora.jsonl import PassageFields
from kalm_integrations.serving.app import create_app
from kalm_integrations.serving.service import open_kalm
from kalm_integrations.serving.settings import ServiceSettings
from kalm_integrations.serving.ui import collection as ui
from kalm_integrations.serving.ui.variants import MAX_RATIO

QUERY = "What do otters eat?"
TEXTS = [
    "The Rhine rises in the Swiss Alps.",
    "Otters have dense fur. It keeps them warm.",
    "Otters live on fish, crabs and frogs.",
    "In 2015 the Panthers gave up 308 points.",
]

Serve = Callable[..., str]
Open = Callable[..., Page]


def ask(page: Page, texts: list[str] | None = None, query: str = QUERY) -> None:
    """Ask, and wait for the answer."""
    page.get_by_label("Question", exact=True).fill(query)
    if texts is not None:
        page.get_by_label("Pasted text").check()
        page.get_by_label(re.compile("One passage a line, or JSON lines")).fill("\n".join(texts))
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#summary")).to_contain_text("ranked by")
    expect(page.locator("#ask")).to_have_text("Ask")


def shown(page: Page) -> list[tuple[str, str]]:
    """The texts and scores under After, from top to bottom."""
    items = page.locator("#after > li")
    return list(zip(items.locator(".text").all_text_contents(), items.locator(".score").all_text_contents(), strict=True))


def wrong(page: Page) -> str:
    """What the page says is wrong."""
    alert = page.get_by_role("alert")
    expect(alert).to_be_visible()
    return alert.inner_text()


# --- asking


def test_passages_are_asked_by_keyboard_alone_and_ranked_as_rank_does(serve: Serve, open_page: Open, pico: KalmReranker):
    page = open_page(serve())
    expect(page.get_by_label("Compression ratio")).to_be_visible()
    press = page.keyboard.press
    press("Tab")
    assert page.evaluate("() => document.activeElement.textContent") == "Skip to the results"
    press("Tab")
    page.keyboard.type(QUERY)
    press("Tab")
    press("Tab")
    page.keyboard.insert_text("\n".join(TEXTS))
    press("Control+Enter")
    expect(page.get_by_role("status").first).to_contain_text("4 passages ranked by pico in")
    ranking = pico.rank(QUERY, TEXTS)
    assert shown(page) == [(passage.text, f"{passage.score:.4f}") for passage in ranking]
    assert page.locator("#before > li .clipped").all_text_contents() == TEXTS
    places = {passage.index: place for place, passage in enumerate(ranking, 1)}
    moves = page.locator("#before > li a").all_text_contents()
    assert [move.split(" is")[0] for move in moves] == [f"→ {places[index]}" for index in range(len(TEXTS))]
    margins = page.locator("#after .margin").all_text_contents()
    assert margins == [f"{passage.margin:+.2f}".replace("-", "\N{MINUS SIGN}") for passage in ranking]


def test_what_was_encoded_is_told_and_found_the_next_time(serve: Serve, open_page: Open):
    page = open_page(serve())
    ask(page, TEXTS)
    expect(page.locator("#summary")).to_contain_text("4 encoded now, 0 found")
    expect(page.locator("#numbers")).to_contain_text("4 missing")
    ask(page, TEXTS, "And where do they live?")
    expect(page.locator("#summary")).to_contain_text("0 encoded now, 4 found")
    expect(page.locator("#numbers")).to_contain_text("4 cached")
    for name in ("Encode", "Score", "Total"):
        expect(page.locator("#numbers div").filter(has_text=re.compile(f"^{name}"))).to_contain_text(re.compile(r"\d ms"))


def test_the_example_can_be_asked_at_once(serve: Serve, open_page: Open):
    page = open_page(serve())
    page.get_by_role("button", name="Fill in an example").click()
    page.keyboard.press("Control+Enter")
    expect(page.locator("#after > li")).to_have_count(5)


def test_a_collection_is_asked_from_the_start(serve: Serve, open_page: Open, tmp_path: Path):
    rows = [{"_id": f"p{n}", "text": text} for n, text in enumerate(TEXTS)]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    collection = ui.Collection("p.jsonl", list(read_candidates(path, PassageFields())), 3)
    page = open_page(serve(collection))
    name = "p.jsonl: 4 passages, of which the 3 best by BM25 are ranked"
    expect(page.get_by_role("radio", name=name)).to_be_checked()
    ask(page)
    expect(page.locator("#after > li")).to_have_count(3)
    expect(page.locator("#before-note")).to_have_text("3 passages, the best by BM25")
    assert re.search(r"p\d · missing", page.locator("#after > li").first.inner_text())
    ask(page, TEXTS)
    expect(page.locator("#after > li")).to_have_count(4)


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("p.txt", "one\r\n\n{two}\nthree", ["one", "{two}", "three"]),
        ("p.jsonl", '\ufeff{"text": "one"}\n\n{"title": "A", "text": "two", "n": 1}\n', ["one", "A two"]),
        ("p", '[{"text": "one"}, {"title": "", "text": "two"}]', ["one", "two"]),
    ],
)
def test_files_are_read_as_the_command_line_reads_them(
    serve: Serve, open_page: Open, tmp_path: Path, name: str, content: str, texts: list[str]
):
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert [row.text for row in read_candidates(path, PassageFields(), takes_plain_lines=True)] == texts
    page = open_page(serve())
    page.get_by_label("A file").check()
    page.locator("#file").set_input_files(path)
    expect(page.locator("#file-note")).to_have_text(f"{len(texts)} passages")
    ask(page)
    assert page.locator("#before > li .clipped").all_text_contents() == texts


def test_encodings_in_a_file_are_used(serve: Serve, open_page: Open, tmp_path: Path, pico: KalmReranker):
    rows = [{"text": text, **made} for text, made in zip(TEXTS, pico.encode_to_metadata(TEXTS), strict=True)]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    page = open_page(serve())
    page.get_by_label("A file").check()
    page.locator("#file").set_input_files(path)
    ask(page)
    expect(page.locator("#numbers")).to_contain_text("4 stored")
    expect(page.locator("#summary")).to_contain_text("0 encoded now")


# --- sentences


def test_sentences_are_shaded_by_their_scores(serve: Serve, open_page: Open, pico: KalmReranker):
    texts = ["🦦 Otters dive. They eat fish, crabs and frogs 🐸 there.", *TEXTS]
    page = open_page(serve())
    ask(page, texts, "Which animals eat fish?")
    n_shaded = 0
    for place, right in enumerate(pico.rank("Which animals eat fish?", texts, spans=3), 1):
        item = page.locator(f"#after-{place}")
        spans = sorted(right.spans or (), key=lambda span: span.start)
        assert item.locator(".sentence").all_text_contents() == [right.text[span.start : span.end] for span in spans]
        shaded = [f"{span.score:.2f}" for span in spans if span.score >= 0.05]
        marks = item.locator("mark").all()
        assert [mark.get_attribute("data-score") for mark in marks] == shaded
        assert [mark.get_attribute("title") for mark in marks] == [f"P(yes) of this sentence: {score}" for score in shaded]
        n_shaded += len(shaded)
    assert n_shaded > 0
    page.get_by_label("Shade sentences of").select_option("0")
    expect(page.locator(".sentence")).to_have_count(0)
    assert shown(page) == [(passage.text, f"{passage.score:.4f}") for passage in pico.rank("Which animals eat fish?", texts)]


# --- compression


def test_the_best_window_of_a_long_passage_is_named(serve: Serve, open_page: Open):
    settings = {"long_passages": "windows", "max_passage_tokens": 64}
    long = "The Rhine rises in the Swiss Alps and flows north. " * 12 + TEXTS[2]
    page = open_page(serve(model_settings=settings))
    ask(page, [TEXTS[0], long])
    ranked = KalmReranker.from_pretrained("pico", **settings).rank(QUERY, [TEXTS[0], long])
    start, end = next(passage.window for passage in ranked if passage.index == 1)
    said = page.locator("#after > li .hint").filter(has_text="best window")
    expect(said).to_have_count(1)
    expect(said).to_contain_text(f"best window: characters {start + 1} to {end}")


def test_ratio_and_codec_change_bytes_and_scores(serve: Serve, open_page: Open):
    page = open_page(serve())
    ask(page, TEXTS)
    totals = {}
    for label, value in (("Codec", "fp32"), ("Codec", "rot2"), ("Compression ratio", "16")):
        page.get_by_label(label).select_option(value)
        ratio, codec = page.get_by_label("Compression ratio").input_value(), page.get_by_label("Codec").input_value()
        expect(page.locator("#settings [aria-current]")).to_have_text(f"{ratio} · {codec}")
        reranker = KalmReranker.from_pretrained("pico", compression_ratio=int(ratio), storage_codec=codec)
        totals[ratio, codec] = sum(encoding.metadata_length() for encoding in reranker.encode_passages(TEXTS))
        right = [(passage.text, f"{passage.score:.4f}") for passage in reranker.rank(QUERY, TEXTS)]
        assert shown(page) == right
        mean = page.locator("#settings tbody tr").first.locator("td").all_text_contents()
        assert f"{int(totals[ratio, codec] / len(TEXTS) + 0.5):,}" in mean
    assert len(set(totals.values())) == 3
    expect(page.locator("#settings thead th")).to_have_count(1 + 4)


def test_all_ratios_and_all_codecs_are_compared(serve: Serve, open_page: Open):
    page = open_page(serve())
    ask(page, TEXTS)
    page.get_by_role("button", name="Compare all ratios").click()
    expect(page.locator("#settings thead th")).to_have_count(1 + 6)
    expect(page.locator("#ask")).to_have_text("Ask")
    expect(page.locator("#settings [aria-current]")).to_have_text("4 · rot4")
    heads = page.locator("#settings thead th").all_text_contents()
    assert (heads[1], heads[-1]) == ("1 · rot4", f"{MAX_RATIO} · rot4")
    page.get_by_role("button", name="Compare all codecs").click()
    expect(page.locator("#settings thead th")).to_have_count(1 + 6 + 6)
    ask(page, TEXTS[:2])
    expect(page.locator("#settings thead th")).to_have_count(1 + 1)


# --- hostile passages


HOSTILE = [
    '<img src=x onerror="document.title=1">',
    "</script><script>document.title=2</script>",
    "<svg onload=document.title=3>",
    "javascript:document.title=4",
    '"><b style="position:fixed">&amp;&lt;',
    "\u202e right to left \u2066 <a href='http://evil.example'>",
    "x" * 3000,
]


def test_hostile_passages_are_text(serve: Serve, open_page: Open):
    page = open_page(serve())
    title = page.title()
    ask(page, HOSTILE, query=HOSTILE[0])
    assert sorted(text for text, _ in shown(page)) == sorted(HOSTILE)
    for tag in ("img", "svg", "script:not([src])", "b", "#results a:not([href^='#after-'])"):
        expect(page.locator(f"main {tag}")).to_have_count(0)
    assert page.title() == title
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


# --- what goes wrong


def test_what_is_missing_is_said_where_it_is_missing(serve: Serve, open_page: Open):
    page = open_page(serve(max_documents=3))
    expect(page.get_by_label("Codec")).to_be_visible()
    page.keyboard.press("Control+Enter")
    assert wrong(page) == "Type a question first."
    expect(page.get_by_label("Question", exact=True)).to_be_focused()
    page.keyboard.type(QUERY)
    page.keyboard.press("Control+Enter")
    assert wrong(page) == "There are no passages yet: paste some, or choose a file."
    expect(page.locator("#pasted")).to_be_focused()
    page.keyboard.insert_text("\n".join(TEXTS))
    page.keyboard.press("Control+Enter")
    assert wrong(page) == "At most 3 passages are ranked at a time, but there are 4."
    page.locator("#pasted").fill('{"text": "a"}\n{"txt": "b"}')
    page.keyboard.press("Control+Enter")
    assert wrong(page) == 'Line 2 must be a JSON object with a string under "text".'
    expect(page.locator("#pasted")).to_have_attribute("aria-invalid", "true")
    ask(page, TEXTS[:3])
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.locator("[aria-invalid]")).to_have_count(0)


def test_files_that_are_no_text_or_too_large_are_refused(serve: Serve, open_page: Open, tmp_path: Path):
    page = open_page(serve(max_body_bytes=1000))
    expect(page.get_by_label("Codec")).to_be_visible()
    page.get_by_label("A file").check()
    (tmp_path / "p.txt").write_bytes("Käse".encode("latin-1"))
    page.locator("#file").set_input_files(tmp_path / "p.txt")
    assert wrong(page) == "p.txt must be UTF-8 text, one passage a line or JSON lines, but is not."
    (tmp_path / "q.txt").write_bytes(b"a" * 1001)
    page.locator("#file").set_input_files(tmp_path / "q.txt")
    assert wrong(page) == "A file may have 1,000 bytes at most, but q.txt has 1,001."


def test_what_the_service_refuses_is_shown(serve: Serve, open_page: Open):
    page = open_page(serve(), refusals=(422,))
    page.get_by_label(re.compile("^Instruction")).fill("x " * 20_000)
    page.get_by_label("Question", exact=True).fill(QUERY)
    page.locator("#pasted").fill("otters")
    page.get_by_role("button", name="Ask").click()
    assert "instruction" in wrong(page).lower()
    expect(page.get_by_role("button", name="Ask")).to_have_text("Ask")


def test_a_service_that_is_gone_is_said_to_be(open_page: Open):
    app = create_app(ServiceSettings.make(), page=ui.Page())
    with in_process(app) as url:
        page = open_page(f"{url}/ui/", refusals=(0,))
        ask(page, TEXTS)
    page.keyboard.press("Control+Enter")
    assert wrong(page).startswith("The service does not answer.")
    # What was answered before stays.
    expect(page.locator("#after > li")).to_have_count(4)


def test_the_page_waits_for_the_model(open_page: Open):
    is_free = threading.Event()

    def open_late(settings: ServiceSettings) -> KalmReranker:
        is_free.wait(60)
        return open_kalm(settings)

    app = create_app(ServiceSettings.make(), open_late, page=ui.Page())
    with in_process(app, waits=False) as url:
        page = open_page(f"{url}/ui/", refusals=(503,))
        expect(page.locator("#model")).to_have_text("The model is being loaded …")
        page.get_by_role("button", name="Fill in an example").click()
        page.keyboard.press("Control+Enter")
        assert wrong(page) == "The model is still being loaded; ask again soon"
        is_free.set()
        expect(page.locator("#model")).to_contain_text("pico")
        expect(page.get_by_role("alert")).to_be_hidden()
        ask(page)


def test_a_key_is_asked_for(serve: Serve, open_page: Open, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KALM_TEST_KEY", "k3y-of-the-tests")
    page = open_page(serve(api_key_env="KALM_TEST_KEY"), refusals=(401,))
    assert wrong(page).startswith("Authorization must be")
    field = page.get_by_label("Key of the service")
    expect(field).to_be_focused()
    for typed in ("wrong", "wröng"):
        field.fill(typed)
        field.press("Enter")
        expect(page.locator("#problem")).to_be_visible()
    field.fill("k3y-of-the-tests")
    field.press("Tab")
    expect(page.locator("#model")).to_contain_text("pico")
    expect(page.get_by_role("alert")).to_be_hidden()
    ask(page, TEXTS)
    assert page.evaluate("() => localStorage.length + sessionStorage.length + document.cookie.length") == 0
