"""The help of every command as Markdown, for docs/cli.md. Run in tests/, `python -m tools.cli_help` writes it there."""

from __future__ import annotations

import typer
from typer.cli import get_docs_for_click

from kalm_integrations.cli import app
from tools.paths import DOCS

PAGE = DOCS / "cli.md"
MARKER = "<!-- What follows is generated; in tests/: python -m tools.cli_help -->\n"


def updated_page() -> str:
    """Return the page with the help as it is now below the marker."""
    intro, marker, _ = PAGE.read_text(encoding="utf-8").partition(MARKER)
    assert marker, f"{PAGE} must have the line {MARKER!r}"
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="kalm")
    return f"{intro}{marker}\n{get_docs_for_click(obj=command, ctx=context, name='kalm', indent=1).strip()}\n"


if __name__ == "__main__":
    PAGE.write_text(updated_page(), encoding="utf-8")
