"""Makes collections for code search: functions of installed packages, with the first sentences of their docstrings as queries.

`python -m tools.code_search FOLDER`, from tests/, writes `train`, `dev` and `test` into a folder, in BEIR's layout. They share
no package, no query and no code. A passage is a function's code without its docstring; its title is the function's full name,
cut into words. `pico` was trained on prose only.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

PACKAGES = {
    "test": ("matplotlib", "networkx", "nltk", "huggingface_hub", "haystack"),
    "dev": ("mteb", "fontTools", "rich", "langsmith"),
    "train": ("torch", "transformers", "ray", "sklearn", "scipy", "pandas", "numpy", "polars", "datasets", "langchain_core"),
}
"""By split; what an earlier one has, a later one leaves out."""

MAX_FUNCTIONS = 1500
"""Of each package, so that none outweighs the others."""
MAX_CHARACTERS = 600
MIN_BODY_LINES = 2
MIN_WORDS, MAX_WORDS = 4, 25
SENTENCE = re.compile(r"[\w ,;'()/-]+")
"""What a query may be made of: no markup, no code."""
WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")
"""A word of an identifier in snake case or camel case."""


class Function(NamedTuple):
    """A function with a sentence that says what it does."""

    query: str
    title: str
    code: str


def read_package(name: str) -> list[Function]:
    """Return the functions of a package, without its tests, in a fixed random order."""
    spec = find_spec(name)
    assert spec is not None, f"{name} must be installed"
    assert spec.submodule_search_locations, f"{name} must be a folder"
    folder = Path(next(iter(spec.submodule_search_locations)))
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        if not any("test" in part for part in parts):
            found += read_file(path, [part for part in parts if part != "__init__"])
    random.Random(0).shuffle(found)
    return found


def read_file(path: Path, names: Sequence[str]) -> list[Function]:
    """Return the functions of a file whose module has these names."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):
        # A template, or a file for another version of Python.
        return []
    return list(_functions(tree, list(names), source.splitlines()))


def _functions(node: ast.AST, names: list[str], lines: Sequence[str]) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _functions(child, [*names, child.name], lines)
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = _function(child, names, lines)
            if function is not None:
                yield function


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, names: list[str], lines: Sequence[str]) -> Function | None:
    docstring = ast.get_docstring(node)
    if not docstring:
        return None
    text = node.body[0]
    signature, body = lines[node.lineno - 1 : text.lineno - 1], lines[text.end_lineno : node.end_lineno]
    body = [line.rstrip() for line in body if line.strip()]
    code = textwrap.dedent("\n".join([*signature, *body]))
    query = re.split(r"\.\s|\n\s*\n", f"{docstring} ")[0]
    query = " ".join(query.split()).rstrip(".")
    is_short = MIN_WORDS <= len(query.split()) <= MAX_WORDS and len(code) <= MAX_CHARACTERS
    if not (is_short and len(body) >= MIN_BODY_LINES and SENTENCE.fullmatch(query)):
        return None
    return Function(query, " ".join(WORD.findall(" ".join([*names, node.name]))), code)


def without_repeats(functions: Sequence[Function], seen: set[str]) -> list[Function]:
    """Return functions whose query and code have not been seen, not even with other blanks or another name; add theirs."""
    new = []
    for function in functions:
        keys = {re.sub(r"\W", "", function.query.lower()), re.sub(r"\s", "", function.code.partition("(")[2])}
        if not keys & seen:
            new.append(function)
            seen |= keys
    return new


def write(folder: Path, functions: Sequence[Function], split: str) -> None:
    """Write a collection in BEIR's layout."""
    (folder / "qrels").mkdir(parents=True)
    passages = [{"_id": f"p{i}", "title": f.title, "text": f.code} for i, f in enumerate(functions)]
    queries = [{"_id": f"q{i}", "text": f.query} for i, f in enumerate(functions)]
    for name, rows in (("corpus", passages), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    judgements = "".join(f"q{i}\tp{i}\t1\n" for i in range(len(functions)))
    (folder / "qrels" / f"{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judgements}", encoding="utf-8")


def main(folder: Path) -> None:
    """Write the collections."""
    seen: set[str] = set()
    for split, packages in PACKAGES.items():
        found = {name: without_repeats(read_package(name), seen)[:MAX_FUNCTIONS] for name in packages}
        write(folder / split, [function for functions in found.values() for function in functions], split)
        counts = ", ".join(f"{name} {len(functions):,}" for name, functions in found.items())
        print(f"{split}: {sum(map(len, found.values())):,} functions ({counts})")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
