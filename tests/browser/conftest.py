"""A browser without a window, and pages in it that must not complain nor ask anybody else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from tools.services import in_process

from kalm_integrations import KalmReranker
from kalm_integrations.serving import ui
from kalm_integrations.serving.app import create_app
from kalm_integrations.serving.settings import ServiceSettings

WIDE = {"width": 1280, "height": 900}

expect.set_options(timeout=120_000)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium."""
    path = shutil.which("chromium")
    assert path, "the tests of the page need chromium: `make browser` installs it where it may"
    # A sandbox cannot be made by root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Serves the built-in model and the page within this process; returns the page's URL."""
    with ExitStack() as stack:

        def serve(collection: ui.collection.Collection | None = None, **settings: object) -> str:
            app = create_app(ServiceSettings.make(**settings), page=ui.collection.Page(collection))
            return stack.enter_context(in_process(app)) + "/ui/"

        yield serve


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages. In the end nothing was asked elsewhere, and no error is in the console but refusals that were expected."""
    pages: list[tuple[str, list[str], list[str], set[int]]] = []
    with ExitStack() as stack:

        def open_page(url: str, *, refusals: tuple[int, ...] = (), **settings: object) -> Page:
            context = browser.new_context(**{"viewport": WIDE, **settings})
            stack.callback(context.close)
            page = context.new_page()
            asked: list[str] = []
            said: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: said.append(f"error: {error}"))
            pages.append((url, asked, said, set(refusals)))
            page.goto(url)
            return page

        yield open_page
    for url, asked, said, refusals in pages:
        assert {urlsplit(address)[:2] for address in asked} == {urlsplit(url)[:2]}
        expected = tuple(f"error: Failed to load resource: the server responded with a status of {code}" for code in refusals)
        gone = ("error: Failed to load resource: net::ERR_CONNECTION_REFUSED",) if 0 in refusals else ()
        assert [line for line in said if not line.startswith((*expected, *gone))] == []


@pytest.fixture(scope="session")
def pico() -> KalmReranker:
    """The built-in model as nobody else uses it."""
    return KalmReranker.from_pretrained("pico")
