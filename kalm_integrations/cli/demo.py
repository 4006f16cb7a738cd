"""`kalm demo`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from kalm_integrations.cli import options


def demo(
    model: options.Model = "pico",
    part: Annotated[
        Literal["reranking", "frameworks"] | None, typer.Option(help="Show one part only.", show_default=False)
    ] = None,
) -> None:
    """Show the package at work on a sample.

    Reranking first, then storing encodings and querying again under LangChain, LlamaIndex and Haystack.
    """
    from kalm_integrations.demo import main as run

    run(model, part)
