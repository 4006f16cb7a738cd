"""Second part of the demo: encodings live in each framework's own store, and outlive the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from kalm_integrations.corpora.beir import Collection
from kalm_integrations.demo.layout import columns, heading, plain, seconds, shortened
from kalm_integrations.demo.stage import N_CANDIDATES, Step, first_question
from kalm_integrations.errors import KalmError

STAGES = {
    "ingest": "One process encodes the sample, stores it, and asks:",
    "restart": "A new process has only the files that the first one left:",
}


def show_frameworks(model: str, sample: Path, console: Console) -> None:
    """Ingest and ask under each framework, ask again in a new process, and print what each step encoded.

    Args:
        model: an alias, a hub id or a folder.
        sample: a BEIR folder.
        console: where to print.

    Raises:
        KalmError: a process failed.
    """
    heading(console, "LangChain, LlamaIndex, Haystack: encodings are kept in their stores")
    plain(console, f"Question: {first_question(Collection.read(sample))}")
    plain(console, f"Each finds {N_CANDIDATES} candidates and reranks them. Times include opening the store.")
    steps: list[Step] = []
    with tempfile.TemporaryDirectory() as folder:
        for stage, title in STAGES.items():
            with console.status("working ..."):
                done = list(_run(stage, Path(folder), sample, model))
            _show_steps(title, done, console)
            steps += done
    for answer in dict.fromkeys(step.best for step in steps if step.best):
        names = ", ".join(dict.fromkeys(step.framework for step in steps if step.best == answer))
        plain(console, f"\nFirst with {names}:")
        console.print(shortened(answer, 2 * console.width))


def _show_steps(title: str, steps: Sequence[Step], console: Console) -> None:
    plain(console, f"\n{title}")
    table = columns("framework", "step", "encoded", "from the store", "time", n_words=2)
    for step in steps:
        if step.problem:
            plain(console, f"{step.framework} is left out: {step.problem}")
        else:
            table.add_row(step.framework, step.name, f"{step.encoded:,}", f"{step.from_store:,}", seconds(step.seconds))
    console.print(table)


def _run(stage: str, folder: Path, sample: Path, model: str) -> Iterator[Step]:
    command = [sys.executable, "-m", "kalm_integrations.demo.stage", stage, str(folder), str(sample), model]
    # Haystack would report to its makers what runs.
    environment = {**os.environ, "HAYSTACK_TELEMETRY_ENABLED": "False"}
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False, env=environment)
    if done.returncode:
        msg = f"a process of the demo must end well, but this one did not ({' '.join(command)}):\n{done.stderr}"
        raise KalmError(msg)
    for line in done.stdout.splitlines():
        yield Step(**json.loads(line))
