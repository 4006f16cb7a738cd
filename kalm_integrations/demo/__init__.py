"""A tour on a small sample: `kalm demo`.

`reranking.py` is the first part, `frameworks.py` the second, `next_steps.py` says how to go on. The `on_*.py` modules show
what an application looks like under each framework; beside the adapters they are the only modules that import one.
"""

from __future__ import annotations

import os
from typing import Literal

from kalm_integrations.logs import only_errors

Part = Literal["reranking", "frameworks"]


def main(model: str | os.PathLike[str] = "pico", part: Part | None = None) -> None:
    """Run the demo and print what happens to standard output.

    Args:
        model: an alias, a hub id or a folder.
        part: which part to run; None runs both.

    Raises:
        KalmError: the checkpoint cannot be used, or an extra is missing.
    """
    from rich.console import Console

    from kalm_integrations.core.reranker import KalmReranker
    from kalm_integrations.demo.frameworks import show_frameworks
    from kalm_integrations.demo.layout import WIDTH
    from kalm_integrations.demo.next_steps import show_next_steps
    from kalm_integrations.demo.reranking import show_reranking
    from kalm_integrations.samples import XQUAD_EN

    console = Console(highlight=False)
    console.width = min(console.width, WIDTH)
    # The demo says in its own words what the package would notice.
    with only_errors("kalm_integrations"):
        reranker = KalmReranker.from_pretrained(model)
        if part != "frameworks":
            show_reranking(reranker, os.fspath(model), XQUAD_EN, console)
        if part != "reranking":
            show_frameworks(os.fspath(model), XQUAD_EN, console)
        show_next_steps(os.fspath(model), console)
