"""How the page looks, and what it is for those who do not see it: both widths, both colour schemes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from kalm_integrations.samples import XQUAD_EN

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]

Opened = Callable[..., Page]


@pytest.fixture
def asked(serve: Callable[..., str], open_page: Opened) -> Opened:
    """Opens the page, and asks some passages of the sample, which are long."""

    def asked(**settings: object) -> Page:
        page = open_page(serve(), **settings)
        page.get_by_label("Question", exact=True).fill("How many points did the Panthers defense give up?")
        lines = (XQUAD_EN / "corpus.jsonl").read_text(encoding="utf-8").splitlines()[:8]
        page.locator("#pasted").fill("\n".join(lines))
        page.keyboard.press("Control+Enter")
        expect(page.locator("#after > li")).to_have_count(8)
        return page

    return asked


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_axe_finds_nothing(asked: Opened, size: dict[str, int], scheme: str):
    """Names, roles, landmarks, contrast; before and after an answer, and with a problem."""
    page = asked(viewport=size, color_scheme=scheme)
    page.get_by_label("Codec").select_option("rot2")
    expect(page.locator("#settings thead th")).to_have_count(3)
    page.get_by_label("A file").check()
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("alert")).to_be_visible()
    found = Axe().run(page, options={"runOnly": RULES, "resultTypes": ["violations", "passes"]}).response
    problems = [(rule["id"], node["html"], node["failureSummary"]) for rule in found["violations"] for node in rule["nodes"]]
    assert problems == []
    assert {"color-contrast", "label", "region"} <= {rule["id"] for rule in found["passes"]}


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_nothing_is_cut_off(asked: Opened, size: dict[str, int]):
    page = asked(viewport=size)
    page.get_by_role("button", name="Compare all codecs").click()
    expect(page.locator("#settings thead th")).to_have_count(8)
    assert page.evaluate("() => document.documentElement.scrollWidth") == size["width"]
    # Both at once, for the page may still be scrolling.
    before, after = page.evaluate(
        """() => ["before", "after"].map((id) => document.getElementById(id).closest("section").getBoundingClientRect())"""
    )
    if size is WIDE:
        assert before["top"] == after["top"]
        assert before["right"] < after["left"]
    else:
        assert before["bottom"] < after["top"]


def test_long_passages_are_opened_by_keyboard(asked: Opened):
    page = asked(viewport=NARROW)
    item = page.locator("#after > li").filter(has=page.get_by_role("button")).first
    height = item.bounding_box()["height"]
    button = item.get_by_role("button")
    expect(button).to_have_attribute("aria-expanded", "false")
    button.focus()
    page.keyboard.press("Enter")
    expect(button).to_have_attribute("aria-expanded", "true")
    assert item.bounding_box()["height"] > height
    page.keyboard.press("Enter")
    assert item.bounding_box()["height"] == height


def test_a_passage_is_followed_from_before_to_after(asked: Opened):
    page = asked()
    link = page.locator("#before > li a").first
    place = link.get_attribute("href").removeprefix("#after-")
    link.focus()
    page.keyboard.press("Enter")
    target = page.locator(f"#after-{place}")
    expect(target).to_be_in_viewport()
    expect(target).to_be_focused()
    assert target.locator(".text").text_content() == page.locator("#before > li .clipped").first.text_content()


def test_what_moves_stays_still_for_those_who_want_it(asked: Opened):
    assert scroll_behaviour(asked()) == "smooth"
    assert scroll_behaviour(asked(reduced_motion="reduce")) == "auto"


def scroll_behaviour(page: Page) -> str:
    return page.evaluate("() => getComputedStyle(document.documentElement).scrollBehavior")
