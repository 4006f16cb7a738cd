"""A finding, and the guard around a group of checks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from kalm_integrations.errors import KalmError

Status = Literal["ok", "note", "must be fixed"]


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    name: str
    """What was looked at."""
    status: Status
    """"note" is worth knowing: it may be meant so."""
    found: str
    remedy: str = ""


def ok(name: str, found: str) -> Finding:
    """Return a finding that is as it should be."""
    return Finding(name, "ok", found)


def note(name: str, found: str, remedy: str = "") -> Finding:
    """Return a finding that is worth knowing."""
    return Finding(name, "note", found, remedy)


def broken(name: str, found: str, remedy: str = "") -> Finding:
    """Return a finding that must be fixed; the remedy may stand in the message of an error."""
    return Finding(name, "must be fixed", found, remedy)


def guarded(name: str, findings: Iterable[Finding]) -> Iterator[Finding]:
    """Yield findings; an error among them is one more, and the last.

    Args:
        name: of that one.
        findings: made one by one, by code that may fail in any way.
    """
    try:
        yield from findings
    except KalmError as error:
        yield broken(name, str(error))
    except Exception as error:  # a broken installation can fail in any way
        yield broken(name, describe(error), "repair what the message names; this group of checks ends here")


def describe(error: BaseException) -> str:
    """Return an error as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
