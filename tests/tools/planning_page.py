"""The examples of docs/planning.md: every `$ kalm plan …` with what it prints. `python -m tools.planning_page` writes them."""

from __future__ import annotations

import re
import shlex

from typer.testing import CliRunner

from kalm_integrations.cli import app
from tools.paths import DOCS

PAGE = DOCS / "planning.md"
EXAMPLE = re.compile(r"^```console\n\$ kalm (plan [^\n]*)\n.*?^```$", re.MULTILINE | re.DOTALL)
WIDTH = 120
"""Columns of the terminal."""


def updated_page() -> str:
    """Return the page with what its examples print now; they give --speed, so that it does not depend on the machine."""
    return EXAMPLE.sub(_run, PAGE.read_text(encoding="utf-8"))


def _run(example: re.Match[str]) -> str:

    result = CliRunner().invoke(app, shlex.split(example[1]), catch_exceptions=False, env={"COLUMNS": str(WIDTH)})
    printed = "\n".join(line.rstrip() for line in result.stdout.rstrip().splitlines())
    return f"```console\n$ kalm {example[1]}\n{printed}\n```"


if __name__ == "__main__":
    PAGE.write_text(updated_page(), encoding="utf-8")
