"""The wheels hold what an installation needs, and kalm-integrations works without the source tree."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
from tools.bounds import lower_bounds
from tools.packages import PACKAGES as THIN_FOLDERS
from tools.packages import THIN, Thin, with_version
from tools.paths import DOCS, ROOT

PACKAGES = ("kalm_integrations", "haystack_integrations")
PARTS = (
    "kalm_integrations/checkpoints/pico/model.safetensors",
    "kalm_integrations/checkpoints/pico/tokenizer.json",
    "kalm_integrations/samples/xquad-en/corpus.jsonl",
    "kalm_integrations/serving/ui/static/index.html",
    "kalm_integrations/serving/ui/static/page.js",
    "kalm_integrations/py.typed",
    "haystack_integrations/common/kalm/py.typed",
    "haystack_integrations/components/embedders/kalm/py.typed",
    "haystack_integrations/components/rankers/kalm/py.typed",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def held(wheel: zipfile.ZipFile) -> set[str]:
    return {name for name in wheel.namelist() if ".dist-info/" not in name}


def metadata(wheel: zipfile.ZipFile) -> Message:
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return message_from_bytes(wheel.read(name))


def test_wheel_holds_every_file_of_both_packages(wheel: zipfile.ZipFile):
    """Modules, the built-in checkpoint, samples and py.typed; and nothing of the tests."""
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    assert held(wheel) == {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


@pytest.mark.parametrize("part", PARTS)
def test_wheel_holds_checkpoint_samples_page_and_the_marks_of_typed_packages(wheel: zipfile.ZipFile, part: str):
    assert part in wheel.namelist()


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


def test_unpacked_wheel_is_a_command(wheel: zipfile.ZipFile, tmp_path: Path):
    """The built-in checkpoint ranks, found beside the modules that run."""
    wheel.extractall(tmp_path)
    command = [sys.executable, "-m", "kalm_integrations", "rerank", "What do otters eat?", "--top-k", "1"]
    passages = "The Panthers gave up 308 points in 2015.\nOtters live on fish and crabs.\n"
    done = subprocess.run(command, cwd=tmp_path, input=passages, capture_output=True, text=True, encoding="utf-8", check=True)
    assert "Otters live on fish" in done.stdout


def test_the_lower_bounds_are_those_that_make_lowest_last_passed_with(wheel: zipfile.ZipFile):
    """Whoever changes a bound runs it, and says so in the documentation."""
    required = metadata(wheel).get_all("Requires-Dist")
    told = " ".join((DOCS / "contributing.md").read_text(encoding="utf-8").split())
    for package, bounds in lower_bounds(required).items():
        for bound in bounds:
            assert f"{package} {bound}" in told


# --- the thin distributions


@pytest.fixture(scope="module", params=THIN, ids=lambda thin: thin.wheel)
def thin(request: pytest.FixtureRequest) -> Thin:
    return request.param


@pytest.fixture(scope="module")
def thin_wheel(thin: Thin, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from the source distribution, as `build` does unless told otherwise: so that one is whole, too."""
    folder = tmp_path_factory.mktemp("thin")
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, thin.folder], check=True)
    [path] = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_every_folder_of_packages_is_a_thin_distribution():
    assert {path.name for path in THIN_FOLDERS.iterdir()} == {thin.name for thin in THIN}


def test_a_thin_distribution_has_the_version_of_kalm_integrations(thin: Thin):
    """Run `python -m tools.packages` in tests/ if this fails."""
    text = (thin.folder / "pyproject.toml").read_text(encoding="utf-8")
    assert text == with_version(text)
    assert with_version(text, "9.8.7").count("9.8.7") == 2


def test_a_thin_wheel_holds_one_module_and_collides_with_nothing(thin: Thin, thin_wheel: zipfile.ZipFile):
    """Namespaces stay open: no `__init__.py` lies above ours."""
    room = thin.module.replace(".", "/")
    assert held(thin_wheel) == {f"{room}/__init__.py", f"{room}/py.typed"}


def test_a_thin_wheel_says_what_it_is(thin: Thin, thin_wheel: zipfile.ZipFile, wheel: zipfile.ZipFile):
    found, core = metadata(thin_wheel), metadata(wheel)
    assert found["Name"] == thin.name
    for field in ("Version", "Requires-Python", "License-Expression"):
        assert found[field] == core[field]
    extra = thin.adapter.replace("_", "-")
    assert extra in core.get_all("Provides-Extra")
    assert found.get_all("Requires-Dist") == [f"kalm-integrations[{extra}]=={core['Version']}"]
    assert found.get_payload() == (thin.folder / "README.md").read_text(encoding="utf-8")
    [text] = [thin_wheel.read(name) for name in thin_wheel.namelist() if name.endswith("licenses/LICENSE")]
    assert text == (ROOT / "LICENSE").read_bytes()
