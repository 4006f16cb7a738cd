"""The help of every command, in the terminal and in the documentation."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import typer
from tools import cli_help
from tools.command_line import Run, run_process

from kalm_integrations import __version__
from kalm_integrations.cli import app, completion
from kalm_integrations.core.checkpoint.locate import ALIASES, BUILT_IN_ALIASES
from kalm_integrations.core.settings import (
    CODEC_NAMES,
    COMPRESSION_RATIOS,
    DEFAULT_CODEC,
    DTYPES,
    QuerySettings,
    StorageSettings,
    make_settings,
)


def commands(group: Any = None, path: str = "") -> dict[str, Any]:
    """Every command by its name, those of a group behind the group's."""
    group = group or typer.main.get_command(app)
    found = {}
    for name, command in group.commands.items():
        found[path + name] = command
        if hasattr(command, "commands"):
            found |= commands(command, f"{path}{name} ")
    return found


def test_every_command_and_option_has_help() -> None:
    assert {"rerank", "encode", "inspect", "eval", "eval beir", "demo", "train", "info"} <= set(commands())
    for name, command in commands().items():
        assert command.help, name
        assert all(parameter.help for parameter in command.params), name
        assert "..." not in command.get_short_help_str(), f"the first line of {name}'s help must fit the list of commands"


def test_documented_help_is_up_to_date() -> None:
    assert cli_help.PAGE.read_text(encoding="utf-8") == cli_help.updated_page(), "run, in tests/: python -m tools.cli_help"


def test_documented_defaults_are_the_settings_ones() -> None:
    """Defaults of the core are repeated in the help, because it must not load the core."""
    options = {parameter.name: parameter for parameter in commands()["encode"].params}
    assert options["codec"].show_default == DEFAULT_CODEC
    assert options["ratio"].show_default == str(StorageSettings().compression_ratio)
    assert all(codec in options["codec"].help for codec in CODEC_NAMES)
    compared = {parameter.name: parameter for parameter in commands()["eval beir"].params}
    assert compared["codecs"].default == DEFAULT_CODEC


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from kalm_integrations.cli import app\n"
        "try: app(['rerank', '--help'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        "loaded = {'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_version_and_bare_command(run: Run) -> None:
    assert run("--version").stdout == f"kalm-integrations {__version__}\n"
    bare = run()
    assert bare.exit_code == 0
    assert "rerank" in bare.stdout


def test_the_package_runs_as_a_module() -> None:
    assert run_process("rerank", "--help").stdout.startswith(b"Usage: kalm rerank ")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("kalm re", ["rerank"]),
        ("kalm rerank --to", ["--top-k"]),
        ("kalm rerank q --model na", ["nano", "nano-r2"]),
        ("kalm encode --codec rot", ["rot4", "rot3", "rot2"]),
        ("kalm plan --ratio 1", ["1", "16", "128"]),
        ("kalm eval beir --codecs fp16,int", ["fp16,int8"]),
        ("kalm eval compression --ratios 1,2,6", ["1,2,64"]),
        ("kalm encode --engine r", ["ray"]),
        ("kalm plan --prefix-dtype f", ["float32", "float16"]),
        ("kalm rerank q --model ./na", []),
    ],
)
def test_a_shell_completes_commands_options_and_values(words: str, expected: list[str]) -> None:
    """In the way that typer's --install-completion sets up: bash gives the words and the place of the one to complete."""
    place = str(words.count(" "))
    done = run_process(_KALM_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=place)
    assert (done.returncode, done.stdout.decode().split("\n")) == (0, [*expected, ""] if expected else ["", ""])


def test_completion_can_be_installed_and_shown(run: Run) -> None:
    assert "--install-completion" in run("--help").stdout


def test_every_option_of_a_known_kind_completes_its_values() -> None:
    kinds = {"model", "codec", "ratio", "device", "dtype", "prefix_dtype", "codecs", "ratios", "migrate", "teacher"}
    found = {
        f"{name} {parameter.name}": parameter.shell_complete
        for name, command in commands().items()
        for parameter in command.params
        if parameter.name in kinds
    }
    assert len(found) > len(kinds)
    assert [option for option, complete in found.items() if not complete(typer.Context(typer.main.get_command(app)), "")] == []


def test_completed_values_are_those_that_the_settings_take() -> None:
    assert completion.codecs("") == list(CODEC_NAMES)
    assert completion.ratios("") == [str(ratio) for ratio in COMPRESSION_RATIOS]
    assert completion.models("") == [*BUILT_IN_ALIASES, *ALIASES]
    assert set(completion.dtypes("")) == set(DTYPES.values())
    for dtype in completion.prefix_dtypes(""):
        assert make_settings(QuerySettings, {"prefix_dtype": dtype}).prefix_dtype == dtype
