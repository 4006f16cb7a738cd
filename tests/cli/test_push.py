"""`kalm push`: what arrives at a hub, what does not, and what its refusals read like."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tools.command_line import Run, assert_fails, run_process
from tools.fake_hub import FakeHub, Repository, fake_hub

from kalm_integrations.training.card import CardFacts, write_card

Push = Callable[..., "subprocess.CompletedProcess[bytes]"]

NO_XET = {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
"""The hub's own storage protocol has servers of its own; without it, files go the way of LFS."""


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint with a card that states a licence, licence texts, and things that are no part of it."""
    made = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    write_card(made, CardFacts("owner/name", license="mit"))
    (made / "LICENSE").write_text("may be used")
    (made / "notes.txt").write_text("mine")
    (made / "optimizer.pt").write_bytes(b"mine")
    (made / "logs").mkdir()
    (made / "logs" / "config.json").write_text("mine")
    return made


OTHERS = {"notes.txt", "optimizer.pt", "logs"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in OTHERS}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as hub:
        yield hub


@pytest.fixture
def push(folder: Path, hub: FakeHub, tmp_path: Path) -> Push:
    """Runs `kalm push` on the folder in a process that knows of the hub on this machine only."""

    def push(*arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
        home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": hub.token, "HF_HUB_OFFLINE": "0"}
        return run_process("push", folder, *arguments, **{**NO_XET, **home, **environment})

    return push


def said(process: subprocess.CompletedProcess[bytes]) -> str:
    """The error, which is one line."""
    assert (process.returncode, process.stdout) == (2, b"")
    [line] = [line for line in process.stderr.decode().splitlines() if line.startswith("kalm: error: ")]
    return line.removeprefix("kalm: error: ")


def test_what_arrives_is_the_checkpoint_byte_by_byte_and_can_be_used_from_there(push, hub, folder, tmp_path):
    process = push("owner/name")
    assert process.returncode == 0, process.stderr.decode()
    assert process.stdout.decode().split() == [f"{hub.url}/owner/name"]
    assert "left out, as no part of a checkpoint: logs, notes.txt, optimizer.pt" in process.stderr.decode()
    repository = hub.repositories["owner/name"]
    assert repository.branches == {"main": files_of(folder)}
    assert (repository.private, repository.messages) == (False, ["Upload a reranker"])
    assert hub.token not in process.stdout.decode() + process.stderr.decode()
    home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "other"), "HF_TOKEN": hub.token, "HF_HUB_OFFLINE": "0"}
    settings = ("rerank", "a query", "--json")
    [here, there] = (
        run_process(*settings, "--model", model, stdin=b"one\ntwo\n", **NO_XET, **home) for model in (folder, "owner/name")
    )
    assert there.returncode == 0, there.stderr.decode()
    local, fetched = (json.loads(process.stdout) for process in (here, there))
    assert local["results"] == fetched["results"]


def test_a_second_push_replaces_the_weights_of_the_first_and_keeps_the_rest(push, hub, folder):
    stale = {"model-00001-of-00002.safetensors": b"", "model.safetensors.index.json": b"{}", "model.safetensors": b"old"}
    kept = {"onnx/model.safetensors": b"theirs", "figure.png": b"theirs"}
    hub.repositories["owner/name"] = Repository(private=True, branches={"main": {}, "next": {**stale, **kept}})
    process = push("owner/name", "--private", "--revision", "next", "--message", "better")
    assert process.returncode == 0, process.stderr.decode()
    assert process.stdout.decode().split() == [f"{hub.url}/owner/name/tree/next"]
    repository = hub.repositories["owner/name"]
    assert repository.branches == {"main": {}, "next": {**kept, **files_of(folder)}}
    assert (repository.private, repository.messages) == (True, ["better"])


def test_private_makes_a_private_repository_and_no_branch_is_needed_before(push, hub, folder):
    (folder / "README.md").unlink()
    process = push("owner/name", "--private", "--revision", "v2")
    assert process.returncode == 0, process.stderr.decode()
    repository = hub.repositories["owner/name"]
    assert repository.private
    assert repository.branches == {"main": {}, "v2": files_of(folder)}


def test_private_uploads_nothing_into_a_public_repository(push, hub):
    hub.repositories["owner/name"] = Repository()
    assert "owner/name is there and public, so nothing was uploaded" in said(push("owner/name", "--private"))
    assert hub.repositories["owner/name"].branches == {"main": {}}


def test_refusals_of_the_hub_are_one_line_with_what_to_do(push, hub, folder):
    assert "the token is missing or not valid; log in with `hf auth login`" in said(push("owner/name", HF_TOKEN="hf_other"))
    hub.refusals["/api/repos/create"] = (403, "You don't have the rights to create a model under the namespace owner")
    assert "must have the right to write to owner/name" in said(push("owner/name"))
    hub.refusals = {"/api/models/owner/name/preupload": (422, "this is too much")}
    assert "does not take owner/name" in (line := said(push("owner/name")))
    assert "this is too much" in line
    hub.refusals = {"/lfs/": (403, "expired")}
    assert "must have the right to write to owner/name" in said(push("owner/name"))
    hub.refusals = {}
    write_card(folder, CardFacts("owner/name", license="nonsense"))
    assert '"license" must be one of' in said(push("owner/name"))
    assert hub.repositories["owner/name"].branches == {"main": {}}


def test_a_hub_that_is_not_there_and_one_that_must_not_be_asked(push, hub):
    line = said(push("owner/name", HF_ENDPOINT="http://127.0.0.1:9"))
    assert "http://127.0.0.1:9 must be reached to publish owner/name, but cannot be" in line
    assert "HF_HUB_OFFLINE is set" in said(push("owner/name", HF_HUB_OFFLINE="1"))
    assert hub.requests == []


# Below, the process of the tests is offline by force: nothing can be asked, whatever the order of the checks.


def test_a_dry_run_lists_files_with_sizes(run: Run, folder: Path) -> None:
    result = run("push", folder, "owner/name", "--dry-run")
    assert result.exit_code == 0
    listed = [line.split()[0] for line in result.stdout.splitlines()]
    assert listed == ["file", *sorted(files_of(folder))]
    assert any(line.split()[:2] == ["LICENSE", "11"] for line in result.stdout.splitlines())


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("config.json", "must hold config.json"),
        ("tokenizer.json", "must hold a fast tokenizer"),
        ("model.safetensors", "must hold model.safetensors"),
    ],
)
def test_what_is_no_reranker_is_not_published(run: Run, folder: Path, broken: str, message: str) -> None:
    (folder / broken).unlink()
    assert_fails(run("push", folder, "owner/name", "--dry-run"), message)


def test_a_folder_that_is_not_there(run: Run) -> None:
    assert_fails(run("push", "nowhere", "owner/name"), "must be the folder of a checkpoint, but 'nowhere' is none")


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the hub could be asked; what is refused before never asks it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "owner/", "owner/two--dashes", "own er/name"])
def test_a_repository_is_owner_and_name(run: Run, folder: Path, repo_id: str) -> None:
    [line] = [x for x in run("push", folder, repo_id).stderr.splitlines() if x.startswith("kalm: error")]
    assert f"a repository of the hub must be owner/name, but got {repo_id!r}" in line


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("card", [None, "---\ntags: [x]\n---\n", "no metadata", "---\n: : :\n---\n"])
def test_what_everybody_can_read_states_its_licence(run: Run, folder: Path, card: str | None) -> None:
    (folder / "README.md").unlink()
    if card is not None:
        (folder / "README.md").write_text(card)
    [line] = [x for x in run("push", folder, "owner/name").stderr.splitlines() if x.startswith("kalm: error")]
    assert "must state its licence" in line
    assert "or publish with --private" in line
