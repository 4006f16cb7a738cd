"""Packages: what is installed, and whether it is new enough."""

from __future__ import annotations

import platform
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from kalm_integrations import __version__
from kalm_integrations.cli.checks.findings import Finding, broken, note, ok

DISTRIBUTION = "kalm-integrations"

EVERYTHING = "all"
"""The extra that holds the others."""

STORE_CLIENTS = (
    "chromadb",
    "elasticsearch",
    "faiss-cpu",
    "lancedb",
    "lmdb",
    "milvus-lite",
    "opensearch-py",
    "pgvector",
    "pinecone",
    "psycopg",
    "pymilvus",
    "qdrant-client",
    "redis",
    "weaviate-client",
)


class Need(NamedTuple):
    """A requirement of this package."""

    name: str
    least: str
    """The lowest version, or nothing."""
    extra: str
    """The extra that it belongs to, or nothing."""


def check_packages() -> Iterator[Finding]:
    """Look at this package, Python, what the package requires, its extras, and clients of stores."""
    folder = Path(str(sys.modules["kalm_integrations"].__file__)).parent
    yield ok(DISTRIBUTION, f"{__version__} in {folder}")
    yield ok("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}")
    try:
        needs = list(parse(metadata.requires(DISTRIBUTION) or []))
    except metadata.PackageNotFoundError:
        yield note(DISTRIBUTION, "runs, but is not installed here, so what it requires is not known", "pip install -e .")
        return
    by_extra: defaultdict[str, list[Need]] = defaultdict(list)
    for need in needs:
        by_extra[need.extra].append(need)
    required = by_extra.pop("", [])
    for need in required:
        lack = lacking(need)
        if lack is not None:
            yield broken(need.name, f"{need.name} {lack}", f'pip install "{need.name}>={need.least}"')
    yield ok("required packages", versions(need.name for need in required))
    by_extra.pop(EVERYTHING, None)
    for extra, parts in by_extra.items():
        lacks = {need.name: lack for need in parts if (lack := lacking(need)) is not None}
        name = f"[{extra}]"
        if not lacks:
            yield ok(name, versions(need.name for need in parts))
        else:
            which = ", ".join(f"{package} {lack}" for package, lack in lacks.items())
            yield note(name, which, f'if you need it: pip install "{DISTRIBUTION}[{extra}]"')
    yield ok("clients of stores", versions(STORE_CLIENTS) or "none")


def parse(requirements: list[str]) -> Iterator[Need]:
    """Read requirements as this package writes them: a name, a lowest version at most, and where it is wanted.

    Those for other versions of Python, and those of the package itself, are left out.
    """
    for requirement in requirements:
        wanted, _, marker = requirement.partition(";")
        match = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*(?:>=\s*([\d.]+))?", wanted.strip())
        python = re.search(r"python_version\s*<\s*['\"]([\d.]+)", marker)
        if match is None or match[1] == DISTRIBUTION or (python and sys.version_info[:2] >= release(python[1])):
            continue
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)", marker)
        yield Need(match[1], match[2] or "0", extra[1] if extra else "")


def lacking(need: Need) -> str | None:
    """Return what is wrong with a required package, or None."""
    version = installed(need.name)
    if version is None:
        return "is not installed"
    return f"{version} is older than {need.least}" if release(version) < release(need.least) else None


def versions(names: Iterable[str]) -> str:
    """Return those packages that are installed, with their versions."""
    return ", ".join(f"{name} {version}" for name in names if (version := installed(name)) is not None)


def installed(name: str) -> str | None:
    """Return the version of a package, or None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, without zeros at the end: 2.6 is 2.6.0."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(number) for number in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
