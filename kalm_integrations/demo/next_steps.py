"""How to go on after the demo: commands that work as they are typed where it ran."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from kalm_integrations.demo.layout import heading, plain


class Step(NamedTuple):
    """A thing to try."""

    title: str
    lines: tuple[str, ...]
    """For a shell."""


def show_next_steps(model: str, console: Console) -> None:
    """Print three things to try, and where a model for real work comes from."""
    heading(console, "Three things to try")
    for step in next_steps():
        plain(console, step.title)
        for line in step.lines:
            # A line that is broken cannot be copied.
            console.print(Text(f"  {line}"), soft_wrap=True)
    if model == "pico":
        plain(
            console,
            "\npico is a tiny English model that comes with the package, so that everything runs at once. For real work take "
            "nano or larger, which are fetched from the Hugging Face hub. On a CPU this demo then takes many minutes: "
            f"{started_as()} demo --model nano",
        )


def next_steps() -> Iterator[Step]:
    """Yield three things to try."""
    kalm = started_as()
    ranked = (r"printf 'The Rhine rises in the Alps.\nOtters live on fish.\n' |", f"  {kalm} rerank 'What do otters eat?'")
    yield Step("Rank passages of your own; a file of lines, CSV or JSON lines will do:", ranked)
    planned = (f"{kalm} plan --model nano --passages 1_000_000 --tokens 256",)
    yield Step("See what your collection would take, before it is encoded:", planned)
    install = () if find_spec("fastapi") else (f"{_python(kalm)} -m pip install {_serve_extra()}",)
    yield Step("Look at rankings in a browser:", (*install, f"{kalm} ui"))


def started_as() -> str:
    """Return the command by which this process was started, for a shell in the same folder."""
    program = Path(sys.argv[0])
    if program.parts[-2:] == ("kalm_integrations", "__main__.py"):
        return f"{shlex.quote(sys.executable)} -m kalm_integrations"
    found = shutil.which("kalm")
    is_found = found is not None and program.exists() and os.path.samefile(found, program)  # noqa: PTH121
    # As it was typed: `.venv/bin/kalm` is found by its path only.
    return shlex.quote(str(program)) if program.name == "kalm" and not is_found else "kalm"


def _python(kalm: str) -> str:
    """Return the Python of the environment that the command is in, in the form of the command."""
    if kalm.endswith("/kalm"):
        return f"{kalm.removesuffix('kalm')}python"
    return shlex.quote(sys.executable)


def _serve_extra() -> str:
    """Return what pip has to install for `kalm ui`: the clone, where the demo runs in one."""
    is_clone = Path("pyproject.toml").is_file() and Path("kalm_integrations").is_dir()
    return "-c constraints.txt -e '.[serve]'" if is_clone else "'kalm-integrations[serve]'"
