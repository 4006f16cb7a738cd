"""The command line, `kalm`: a file for each command or group, and what they share.

* `terminal`: errors, notes, tables and JSON. `options`: what several commands take. `ranking`: what those that rank share.
* `streams`: files and standard output, gzipped or not.

Heavy imports stand inside the commands, so that help comes at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from kalm_integrations import __version__
from kalm_integrations.cli import evaluation
from kalm_integrations.cli.calibrate import calibrate
from kalm_integrations.cli.demo import demo
from kalm_integrations.cli.doctor import doctor
from kalm_integrations.cli.encode import encode
from kalm_integrations.cli.explain import explain
from kalm_integrations.cli.info import info
from kalm_integrations.cli.inspect import inspect
from kalm_integrations.cli.plan import plan
from kalm_integrations.cli.rerank import rerank
from kalm_integrations.cli.serve import serve
from kalm_integrations.cli.terminal import OneLineErrors, prepare
from kalm_integrations.cli.training import average, mine, push, train
from kalm_integrations.cli.ui import ui

app = typer.Typer(name="kalm", cls=OneLineErrors, rich_markup_mode=None, pretty_exceptions_enable=False)


def main() -> None:
    """Run the command line."""
    prepare()
    app(prog_name="kalm")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kalm-integrations {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def kalm(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Rerank passages with KaLM-Reranker-V1, encoding each passage once."""
    if context.invoked_subcommand is None:
        print(context.get_help())


for command in (rerank, explain, encode, inspect, plan, serve, ui, calibrate, demo, train, mine, average, push, info, doctor):
    app.command()(command)
app.add_typer(evaluation.app, name="eval")
