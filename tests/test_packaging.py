"""The wheel holds what an installation needs, and works without the source tree."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tools.paths import ROOT

PACKAGES = ("kalm_integrations", "haystack_integrations")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_file_of_both_packages(wheel: zipfile.ZipFile):
    """Modules, the built-in checkpoint, samples and py.typed; and nothing of the tests."""
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    assert held == {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


def test_wheel_holds_the_checkpoint_and_the_samples(wheel: zipfile.ZipFile):
    held = wheel.namelist()
    for part in ("checkpoints/pico/model.safetensors", "checkpoints/pico/tokenizer.json", "samples/xquad-en/corpus.jsonl"):
        assert f"kalm_integrations/{part}" in held


def test_wheel_leaves_the_haystack_namespace_open(wheel: zipfile.ZipFile):
    """An `__init__.py` above ours would hide every other Haystack integration."""
    ours = [name for name in wheel.namelist() if name.startswith("haystack_integrations/") and name.endswith("__init__.py")]
    assert ours
    assert all("/kalm/" in name for name in ours)


def test_unpacked_wheel_works(wheel: zipfile.ZipFile, tmp_path: Path):
    """Both packages come from the wheel, beside another integration from its own place."""
    wheel.extractall(tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import kalm_integrations.haystack
from haystack_integrations.components.rankers import kalm, sentence_transformers
for module in (kalm_integrations, kalm):
    assert module.__file__.startswith({str(tmp_path)!r}), module.__file__
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
