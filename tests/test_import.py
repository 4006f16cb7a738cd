"""What importing costs, what is public, and which module may know which."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tools.paths import ROOT

import kalm_integrations
from kalm_integrations import errors

PACKAGE = "kalm_integrations"

# --- what importing loads


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_nothing_but_the_standard_library():
    """Neither torch nor a framework; nothing else that costs time either."""
    code = (
        "import sys; before = set(sys.modules); import kalm_integrations; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    assert run_python(code).split() == [PACKAGE]


@pytest.mark.parametrize(
    ("module", "unloaded"),
    [
        ("core.types", ("torch", "transformers", "pydantic")),
        ("errors", ("torch", "transformers", "pydantic")),
        ("testing", ("torch", "transformers", "pydantic")),
        ("core.reranker", ("transformers", "huggingface_hub")),
        ("hosting.fields", ("torch", "transformers", "httpx")),
        ("cli", ("torch", "transformers", "httpx")),
        ("remote.reranker", ("torch", "transformers")),
    ],
)
def test_modules_that_are_light_stay_light(module, unloaded):
    code = f"import sys, {PACKAGE}.{module}; print(*[name for name in {unloaded!r} if name in sys.modules])"
    assert run_python(code).split() == []


# --- what is public


def test_all_equals_the_public_names():
    homes = kalm_integrations._HOMES
    assert sorted(kalm_integrations.__all__) == sorted([*homes, "__version__"])
    assert dir(kalm_integrations) == sorted(kalm_integrations.__all__)


def test_type_checkers_see_the_names_where_they_are_loaded_from():
    tree = ast.parse(Path(kalm_integrations.__file__).read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.asname: statement.module for statement in block.body for alias in statement.names}
    assert seen == kalm_integrations._HOMES


@pytest.mark.parametrize("name", kalm_integrations.__all__)
def test_every_public_name_resolves_and_says_what_it_is(name):
    value = getattr(kalm_integrations, name)
    if name != "__version__":
        assert value.__name__ == name
        assert inspect.getdoc(value)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'kalm_integrations' has no attribute 'KaLMReranker'"):
        kalm_integrations.KaLMReranker  # noqa: B018


# --- exceptions


def drawn_tree() -> dict[str, tuple[str | None, str | None]]:
    """Return each exception of the drawing with its parent and the built-in exception in brackets."""
    tree: dict[str, tuple[str | None, str | None]] = {}
    above: list[str] = []
    for line in errors.__doc__.split("```")[1].splitlines()[1:]:
        branch, name, built_in = re.match(r"([ │├└─]*)(\w+)(?: \((\w+)\))?", line).groups()
        above = [*above[: len(branch) // 4], name]
        tree[name] = (above[-2] if len(above) > 1 else None, built_in)
    return tree


def test_the_drawn_exceptions_are_the_classes():
    classes = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}
    tree = drawn_tree()
    assert list(tree) == list(classes)
    for name, (parent, built_in) in tree.items():
        bases = [base.__name__ for base in classes[name].__bases__]
        assert bases == [*([parent] if parent else ["Exception"]), *([built_in] if built_in else [])]
        assert classes[name].__doc__


# --- which module may know which: the contracts are in pyproject.toml, under tool.importlinter


def test_transformers_and_the_hub_are_loaded_when_they_are_needed():
    """Of the core; importing them takes seconds."""
    for path in sorted((ROOT / PACKAGE / "core").rglob("*.py")):
        statements = ast.parse(path.read_text(encoding="utf-8")).body
        for statement in statements:
            names = [alias.name for alias in getattr(statement, "names", [])] + [getattr(statement, "module", None) or ""]
            assert not any(name.split(".")[0] in ("transformers", "huggingface_hub") for name in names), path
