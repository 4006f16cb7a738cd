"""For tests of the command line: what to run it on, and what it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import Result

QUERY = "which team won?"
TEXTS = [
    "The Panthers defense gave up 308 points.",
    "Lift and drag of a wing.",
    "Denver won Super Bowl 50 in 2016.",
    "naïve 東京",
]
KALM = [sys.executable, "-m", "kalm_integrations"]

Run = Callable[..., Result]


def run_process(*arguments: object, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command line in a process of its own."""
    command = [*KALM, *map(str, arguments)]
    return subprocess.run(
        command, input=stdin, capture_output=True, check=False, timeout=120, env={**os.environ, **environment}
    )


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def assert_fails(result: Result, message: str) -> None:
    """One line on standard error, with the message, and exit code 2."""
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("kalm: error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
