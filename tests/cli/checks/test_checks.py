"""Checks of `kalm doctor` on installations and machines that are not at hand."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

import pytest

from kalm_integrations.cli.checks import folders, machine, packages
from kalm_integrations.cli.checks.findings import Finding

REQUIRES = [
    "torch>=2.6",
    "tomli>=2; python_version < '3.0'",
    'langchain-core>=1.3; extra == "langchain"',
    'ray[data,serve]>=2.50; extra == "ray"',
    'kalm-integrations[serve,bulk]; extra == "ray"',
    'langchain-core>=1.3; extra == "all"',
]


def packages_of(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> dict[str, Finding]:
    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(packages.metadata, "requires", lambda name: REQUIRES)
    monkeypatch.setattr(packages.metadata, "version", version)
    return {finding.name: finding for finding in packages.check_packages()}


def test_requirements_are_compared_with_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = packages_of(monkeypatch, {"torch": "2.6.0+cpu", "ray": "2.9", "redis": "5.3"})
    assert found["required packages"].found == "torch 2.6.0+cpu"
    assert found["[langchain]"].status == "note"
    assert found["[langchain]"].remedy == 'if you need it: pip install "kalm-integrations[langchain]"'
    assert found["[ray]"].found == "ray 2.9 is older than 2.50"
    assert found["clients of stores"].found == "redis 5.3"
    assert not {"tomli", "[all]"} & set(found)


@pytest.mark.parametrize(("versions", "said"), [({"torch": "2.5.1"}, "2.5.1 is older than 2.6"), ({}, "is not installed")])
def test_a_required_package_that_lacks_must_be_fixed(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], said: str
) -> None:
    found = packages_of(monkeypatch, versions)["torch"]
    assert (found.status, found.found, found.remedy) == ("must be fixed", f"torch {said}", 'pip install "torch>=2.6"')


def test_a_package_that_is_not_installed_itself_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.metadata, "requires", requires)
    assert [finding.status for finding in packages.check_packages()] == ["ok", "ok", "note"]


@pytest.mark.parametrize(
    ("threads", "cores", "quota", "status", "said"),
    [
        (8, 8, None, "ok", ""),
        (4, 8, None, "ok", ""),
        (8, 8, 2.0, "note", "OMP_NUM_THREADS=2"),
        (8, 8, 1.5, "note", "OMP_NUM_THREADS=2"),
        (1, 8, None, "note", "OMP_NUM_THREADS=8"),
        (1, 1, None, "ok", ""),
    ],
)
def test_threads_are_compared_with_cores_and_quota(
    threads: int, cores: int, quota: float | None, status: str, said: str
) -> None:
    *_, found = machine.check_threads(threads, cores, quota)
    assert found.status == status
    assert said in found.remedy


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_quota_of_a_container(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine.cpu_quota(tmp_path) == quota


def check_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Finding:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    [found] = folders.check_folders()
    return found


def test_a_cache_says_where_it_is_and_how_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "a").write_bytes(bytes(1500))
    (tmp_path / "link").symlink_to(tmp_path / "blobs" / "a")
    assert folders.folder_bytes(tmp_path / "blobs") == (1500, True)
    found = check_cache(monkeypatch, tmp_path)
    assert found.status == "ok"
    assert f"{tmp_path} holds 1." in found.found
    assert "is not there yet" in check_cache(monkeypatch, tmp_path / "new" / "hub").found


def test_a_cache_that_takes_nothing_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(folders, "LOW_BYTES", 10**18)
    assert check_cache(monkeypatch, tmp_path).remedy.startswith("make room, or set HF_HOME")
    monkeypatch.setattr(os, "access", lambda *_: False)
    found = check_cache(monkeypatch, tmp_path / "hub")
    assert found.status == "note"
    assert f"cannot be written, because of {tmp_path}: nothing can be fetched" in found.found
