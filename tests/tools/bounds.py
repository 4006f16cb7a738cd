"""The lower bounds of pyproject.toml, and whether they are what is installed here: `make lowest`."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version

from packaging.requirements import Requirement
from packaging.version import Version
from tools.paths import ROOT


def lower_bounds() -> dict[str, str]:
    """Return the lower bound of each package that the package and its extras need here, by name."""
    return {name: specifier.version for name, specifier in sorted(_specifiers()) if specifier.operator == ">="}
