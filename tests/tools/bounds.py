"""The lowest versions that the package says it works with, and whether they are what is installed here (`make lowest`)."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import distributions, metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

OURS = "kalm-integrations"


def lower_bounds(requirements: Iterable[str]) -> dict[str, list[str]]:
    """Return the lower bounds of each package that is required on this Python, extras included: one may ask for more."""
    bounds: dict[str, list[str]] = {}
    for requirement in map(Requirement, requirements):
        # A marker is about an extra or about Python, never about both.
        marker = requirement.marker
        if requirement.name != OURS and (marker is None or "extra" in str(marker) or marker.evaluate()):
            [bound] = [each.version for each in requirement.specifier if each.operator == ">="]
            if bound not in bounds.setdefault(requirement.name, []):
                bounds[requirement.name].append(bound)
    return dict(sorted(bounds.items()))


def main() -> None:
    """Print the bounds that are installed here, or end with what is installed in their place."""
    versions = {canonicalize_name(each.name): each.version for each in distributions()}
    found = []
    for name, bounds in lower_bounds(metadata(OURS).get_all("Requires-Dist")).items():
        if name in versions:
            if Version(versions[name]) not in map(Version, bounds):
                sys.exit(f"{name} must be at a bound of pyproject.toml, one of {bounds}, but {versions[name]} is installed")
            found.append(f"{name} {versions[name]}")
    print(", ".join(found))


if __name__ == "__main__":
    main()
