"""Runs the notebooks. `python -m tools.notebooks`, in tests/, runs all and writes their outputs; with names, those."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from tools.paths import ROOT

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

TIMED = "timed"
"""Tag of a cell whose output depends on the time or the machine that it ran on."""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
"""Of every notebook: a kernel would add the version of Python."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HAYSTACK_TELEMETRY_ENABLED": "false",
    "TOKENIZERS_PARALLELISM": "false",
    # Threads that wait leave a shared machine to others, so that times are those of the work.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Without widgets, progress bars are plain text, of which tqdm warns.
    "PYTHONWARNINGS": "ignore:IProgress not found",
}
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/(?:home|opt|private|root|tmp|usr|var|work|Users)/")


def read(path: Path) -> NotebookNode:
    """Return a notebook as it lies in a file."""
    return nbformat.read(path, as_version=4)


def run(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Return a notebook with the outputs that its cells give, run from first to last in a new process in a folder.

    Raises:
        CellExecutionError: a cell failed.
    """
    fresh = nbformat.from_dict(notebook)
    client = NotebookClient(
        fresh,
        timeout=600,
        kernel_name="python3",
        coalesce_streams=True,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env={**os.environ, **ENVIRONMENT})
    fresh.metadata = nbformat.from_dict(METADATA)
    return fresh


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Return the cells that run."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_timed(cell: NotebookNode) -> bool:
    """Return whether a cell shows what is another the next time."""
    return TIMED in cell.metadata.get("tags", ())


def kinds(cell: NotebookNode) -> list[str]:
    """Return what a cell shows: text, tables or images."""
    return [kind for output in cell.outputs for kind in sorted(output.get("data", [output.get("name", output.output_type)]))]


def text(cell: NotebookNode) -> str:
    """Return the text that a cell shows, or that stands for a table or image."""
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)


def problems(notebook: NotebookNode) -> list[str]:
    """Return what does not belong into a notebook that is kept: warnings, errors, and paths of one machine."""
    found = []
    for cell in code_cells(notebook):
        if {"stderr", "error"} & set(kinds(cell)):
            found.append(f"{cell.id}: a warning or an error: {text(cell)}")
        if ABSOLUTE_PATH.search(text(cell)):
            found.append(f"{cell.id}: a path of this machine: {text(cell)}")
    return found


def main(names: list[str]) -> None:
    """Run notebooks, all unless some are named, and write them with what they show.

    Raises:
        SystemExit: an output does not belong into a notebook that is kept.
    """
    for path in [path for path in NOTEBOOKS if not names or path.stem in names]:
        with tempfile.TemporaryDirectory() as folder:
            fresh = run(read(path), Path(folder))
        if found := problems(fresh):
            sys.exit("\n".join([f"{path.name} must show results only, but it shows", *found]))
        nbformat.write(fresh, path)


if __name__ == "__main__":
    main(sys.argv[1:])
