"""Checkpoint folders are written whole, replace nothing but checkpoints, and leave what they are made from alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kalm_integrations import KalmReranker
from kalm_integrations.core.checkpoint.folders import check_target, checkpoint_written_beside, copy_files
from kalm_integrations.errors import SettingsError


@pytest.fixture
def model(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "models" / "model")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(folder: Path, source: Path, meanwhile: Callable[[Path], object] = lambda part: None) -> None:
    with checkpoint_written_beside(folder, [source]) as part:
        copy_files(source, part, weights=True)
        meanwhile(part)


@pytest.mark.parametrize("name", ["new", "deeper/new", "empty"])
def test_a_new_folder_has_the_checkpoint_and_nothing_lies_beside_it(tiny_checkpoint: Path, tmp_path: Path, name: str):
    (tmp_path / "empty").mkdir()
    mode = (tmp_path / "empty").stat().st_mode
    write(tmp_path / name, tiny_checkpoint)
    assert contents(tmp_path / name) == contents(tiny_checkpoint)
    assert (tmp_path / name).stat().st_mode == mode
    assert {path.name for path in (tmp_path / name).parent.iterdir()} <= {"new", "deeper", "empty"}


def test_a_checkpoint_is_replaced_with_what_is_written(model: Path, other_checkpoint: Path):
    """By one that lacks some of its files, too; also where the folder is named by a link, which stays one."""
    (model / "README.md").write_text("about it")
    link = model.parent / "link"
    link.symlink_to(model)
    write(link, other_checkpoint)
    assert link.is_symlink()
    assert contents(model) == contents(other_checkpoint)
    assert sorted(path.name for path in model.parent.iterdir()) == ["link", "model"]
    assert len(KalmReranker.from_pretrained(model).score("q", ["a"])) == 1


@pytest.mark.parametrize("name", ["model", "new"])
@pytest.mark.parametrize("break_off", [lambda part: (part / "no" / "where").touch(), shutil.rmtree])
def test_an_error_leaves_what_was_there(model: Path, other_checkpoint: Path, name: str, break_off: Callable[[Path], object]):
    """In the middle, or at the end, where the new folder cannot take its place."""
    before = contents(model)
    with pytest.raises(FileNotFoundError):
        write(model.with_name(name), other_checkpoint, break_off)
    assert contents(model) == before
    assert [path.name for path in model.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "notes.txt").write_text("mine"), "'notes.txt', which is no part of one"),
        (lambda folder: (folder / "sub").mkdir(), "'sub', which is no part of one"),
        (lambda folder: (folder / "link.json").symlink_to("config.json"), "'link.json', which is no part of one"),
        (lambda folder: (folder / "model.safetensors").unlink(), "or no weights beside it"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json of a T5Gemma2 checkpoint"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "no config.json of a T5Gemma2"),
        (lambda folder: (folder / "config.json").write_text("[]"), "no config.json of a T5Gemma2"),
    ],
)
@pytest.mark.parametrize("is_late", [False, True])
def test_a_folder_with_anything_else_in_it_survives(
    model: Path, other_checkpoint: Path, spoil: Callable[[Path], object], message: str, is_late: bool
):
    """Also where it came in while the new one was written. The message names what is in the way."""
    before: dict[str, bytes] = {}

    def spoil_model(_: object = None) -> None:
        spoil(model)
        before.update(contents(model))

    if not is_late:
        spoil_model()
    with pytest.raises(SettingsError, match=f"model holds .*{message}.*; choose another folder"):
        write(model, other_checkpoint, spoil_model if is_late else lambda part: pytest.fail("refused before any work"))
    assert contents(model) == before
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_a_file_is_not_replaced(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SettingsError, match="file is a file; choose another folder"):
        check_target(tmp_path / "file")


@pytest.mark.parametrize(
    ("target", "relation"),
    [
        ("models/model", "is"),
        ("models/model/out/new", "lies in"),
        ("models", "holds"),
        ("link", "is"),
        ("link/new", "lies in"),
    ],
)
@pytest.mark.parametrize("source", ["models/model", "link"])
def test_what_a_checkpoint_is_made_from_survives(model: Path, tmp_path: Path, target: str, relation: str, source: str):
    """Whichever of the two is named by a link."""
    (tmp_path / "link").symlink_to(model)
    before = contents(tmp_path)
    with pytest.raises(SettingsError, match=rf"{target} {relation} .*{source}, which is read; choose another folder"):
        check_target(tmp_path / target, [tmp_path / "elsewhere", tmp_path / source])
    assert contents(tmp_path) == before


def test_files_that_a_source_links_to_survive(model: Path, tmp_path: Path):
    """As in the hub's cache, whose folders of a revision hold links only."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in model.iterdir():
        (snapshot / path.name).symlink_to(path)
    with pytest.raises(SettingsError, match=r"models/model holds .*snapshot, which is read"):
        check_target(model, [snapshot])
    assert check_target(model.with_name("new"), [snapshot]) == model.with_name("new")
