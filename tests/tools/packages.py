"""The thin distributions in packages/. `python -m tools.packages`, in tests/, gives them the version of kalm-integrations."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from kalm_integrations import __version__
from tools.paths import ROOT

PACKAGES = ROOT / "packages"


class Thin(NamedTuple):
    """A distribution, its import name, and the module of kalm_integrations whose names it exports."""

    name: str
    module: str
    adapter: str

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return PACKAGES / self.name

    @property
    def wheel(self) -> str:
        """Its name in those of its files."""
        return self.name.replace("-", "_")


THIN = (
    Thin("kalm-haystack", "kalm_haystack", "haystack"),
    Thin("langchain-kalm", "langchain_kalm", "langchain"),
    Thin("llama-index-postprocessor-kalm", "llama_index.postprocessor.kalm", "llama_index"),
)


def with_version(text: str, version: str = __version__) -> str:
    """Return a pyproject.toml with another version, which is that of what it depends on, too."""
    text = re.sub(r'(?m)^version = "[^"]*"', f'version = "{version}"', text)
    return re.sub(r'(?m)^(dependencies = \["kalm-integrations\[[a-z-]+\]==)[^"]*"', rf'\g<1>{version}"', text)


if __name__ == "__main__":
    for thin in THIN:
        path = thin.folder / "pyproject.toml"
        path.write_text(with_version(path.read_text(encoding="utf-8")), encoding="utf-8")
