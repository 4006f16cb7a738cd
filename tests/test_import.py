"""What importing costs, what is public, and which module may know which."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tools.paths import ROOT

import kalm_integrations
from kalm_integrations import errors

PACKAGE = "kalm_integrations"

FRAMEWORKS = {
    "langchain": ("kalm_integrations.langchain",),
    "llama_index": ("kalm_integrations.llama_index",),
    # Haystack loads components from its own namespace only.
    "haystack": ("kalm_integrations.haystack", "haystack_integrations"),
    "sentence_transformers": ("kalm_integrations.sentence_transformers",),
    "mteb": ("kalm_integrations.evaluation.mteb",),
    "ray": ("kalm_integrations.ray",),
}
"""Framework (and what begins with its name) -> the one package that imports it."""

MODELS_OF_OTHERS = {"sentence_transformers": ("kalm_integrations.corpora.peers",)}
"""Framework -> where its models are run, to compare with or to learn from."""

ADAPTERS = ("langchain", "llama_index", "haystack", "sentence_transformers")


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


# --- which module may know which


def modules() -> Iterator[tuple[str, ast.Module]]:
    for top in (PACKAGE, "haystack_integrations"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts).removesuffix(".__init__"), ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> set[str]:
    """Return the modules that are imported anywhere in a file, also in functions; `from a import b` gives a.b."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


IMPORTS = {name: imported(tree) for name, tree in modules()}


def test_there_is_something_to_check():
    assert {"kalm_integrations", "kalm_integrations.core.reranker", "kalm_integrations.errors"} <= set(IMPORTS)
    assert "kalm_integrations.core.runtime.get_runtime" in IMPORTS["kalm_integrations.core.reranker"]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_framework_is_imported_by_its_adapter_and_the_demo_only(framework):
    allowed = (*FRAMEWORKS[framework], *MODELS_OF_OTHERS.get(framework, ()), f"{PACKAGE}.demo.on_{framework}")
    # langchain_core, langchain_classic, llama_index.core, ...
    pattern = re.compile(rf"{framework}(_(?!integrations)\w+)?(\.|$)")
    importers = {name for name, names in IMPORTS.items() if any(pattern.match(module) for module in names)}
    assert {name for name in importers if not is_within(name, *allowed)} == set()


def test_adapters_know_the_facade_and_each_other_not_at_all():
    """Of the core they use the reranker, the types, pairs, fusion and the errors, so each could be a package of its own."""
    wrong = []
    for adapter in ADAPTERS:
        own = FRAMEWORKS[adapter]
        shared = ("core.fusion", "core.pairs", "core.reranker", "core.types", "errors")
        allowed = (*own, *(f"{PACKAGE}.{name}" for name in shared))
        for name, names in IMPORTS.items():
            if is_within(name, *own):
                ours = {module for module in names if is_within(module, PACKAGE, "haystack_integrations")}
                wrong += [f"{name} imports {module}" for module in ours if not is_within(module, *allowed)]
    assert wrong == []


def test_the_core_imports_the_core_and_the_errors_only():
    wrong = [
        f"{name} imports {module}"
        for name, names in IMPORTS.items()
        if is_within(name, f"{PACKAGE}.core")
        for module in names
        if is_within(module, PACKAGE) and not is_within(module, f"{PACKAGE}.core", f"{PACKAGE}.errors")
    ]
    assert wrong == []


def test_errors_import_nothing_of_ours():
    assert not any(is_within(module, PACKAGE) for module in IMPORTS[f"{PACKAGE}.errors"])


def test_transformers_is_known_to_few_and_loaded_when_needed():
    users = {name for name, names in IMPORTS.items() if any(is_within(module, "transformers") for module in names)}
    core = {name for name in users if is_within(name, f"{PACKAGE}.core")}
    assert core == {f"{PACKAGE}.core.checkpoint"}
    # Training is a Trainer and a tokenizer of transformers; the command line reports its version.
    assert {name for name in users - core if not is_within(name, f"{PACKAGE}.training", f"{PACKAGE}.cli")} == set()
    tree = ast.parse(Path(importlib.import_module(f"{PACKAGE}.core.checkpoint").__file__).read_text(encoding="utf-8"))
    at_the_top = imported(ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], []))
    assert not any(is_within(module, "transformers", "huggingface_hub") for module in at_the_top)
