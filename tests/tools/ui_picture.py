"""The picture of docs/ui.md: the example that the page offers, asked. Run in tests/, `python -m tools.ui_picture` makes it."""

from __future__ import annotations

import os
import shutil

from playwright.sync_api import expect, sync_playwright

from kalm_integrations.serving.app import create_app
from kalm_integrations.serving.settings import ServiceSettings
from kalm_integrations.serving.ui.collection import Page
from tools.paths import DOCS
from tools.services import in_process

PICTURE = DOCS / "figures" / "ui.png"
SIZE = {"width": 960, "height": 925}


def main() -> None:
    """Ask the example, and write what is seen."""
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with in_process(create_app(ServiceSettings.make(), page=Page())) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(f"{url}/ui/")
        page.get_by_role("button", name="Fill in an example").click()
        # From a file, so that the passages are not seen twice.
        texts = page.locator("#pasted").input_value().encode()
        page.get_by_label("A file").check()
        page.locator("#file").set_input_files({"name": "plants.txt", "mimeType": "text/plain", "buffer": texts})
        for codec in ("rot4", "fp16"):
            # At first weights and kernels are made ready, which takes longer than it will.
            page.get_by_label("Codec").select_option(codec)
            page.get_by_role("button", name="Ask").click()
            expect(page.locator("#settings [aria-current]")).to_have_text(f"4 · {codec}", timeout=60_000)
        page.get_by_label("Codec").select_option("rot4")
        expect(page.locator("#settings [aria-current]")).to_have_text("4 · rot4", timeout=60_000)
        page.evaluate("() => document.activeElement.blur()")
        page.screenshot(path=PICTURE)
        browser.close()


if __name__ == "__main__":
    main()
