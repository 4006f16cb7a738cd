"""`kalm doctor`: what it finds, what must be fixed, and that nothing it meets takes it down."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tools.command_line import KALM, Run, run_process
from tools.stub_service import serve

from kalm_integrations import KalmReranker
from kalm_integrations.cli.checks import checkpoint as checkpoint_checks
from kalm_integrations.core.checkpoint import hub
from kalm_integrations.core.checkpoint.locate import ALIASES
from kalm_integrations.planning.plans import make_plan

REPOSITORY, COMMIT = "owner/name", "a" * 40


def examine(run: Run, *arguments: object) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit code, and the findings by name."""
    done = run("doctor", "--json", *arguments)
    said = json.loads(done.stdout)
    statuses = [finding["status"] for finding in said["findings"]]
    assert (said["must_be_fixed"], said["notes"]) == (statuses.count("must be fixed"), statuses.count("note"))
    assert done.exit_code == (1 if said["must_be_fixed"] else 0)
    return done.exit_code, {finding["name"]: finding for finding in said["findings"]}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


def put_into(cache: Path, checkpoint: Path) -> Path:
    """A checkpoint in the cache, as a fetch leaves it."""
    root = cache / "models--owner--name"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    return shutil.copytree(checkpoint, root / "snapshots" / COMMIT)


@contextmanager
def answering(monkeypatch: pytest.MonkeyPatch, status: int, answer: Any = None) -> Iterator[list[str]]:
    """A hub that always says the same; gives the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    reach(monkeypatch, server.server_port)
    try:
        yield asked
    finally:
        server.shutdown()
        server.server_close()


def reach(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")


def test_a_sound_installation_has_nothing_to_fix(run: Run, model: Any) -> None:
    exit_code, found = examine(run, *model)
    assert exit_code == 0
    assert {"kalm-integrations", "Python", "required packages", "[langchain]", "device", "threads", "hub's cache"} <= set(
        found
    )
    assert "torch 2." in found["required packages"]["found"]
    assert found["files"]["status"] == "ok"
    assert "two passages in" in found["ranking"]["found"]
    assert found["hub"]["status"] == "note"


def test_it_fits_a_terminal_and_has_colours_only_there() -> None:
    wide = run_process("doctor", COLUMNS="200", FORCE_COLOR="1").stdout.decode()
    assert "\x1b[32mok" in wide
    done = run_process("doctor", COLUMNS="80", NO_COLOR="1")
    lines = done.stdout.decode().splitlines()
    assert (done.returncode, done.stderr) == (0, b"")
    assert max(map(len, lines)) <= 80
    assert not any("\x1b" in line for line in lines)
    assert [line for line in lines if line and line[0].isupper()][:-1] == [
        "Packages",
        "Machine",
        "Checkpoint",
        "Folders",
        "Stores",
    ]
    assert lines[-1].startswith("Nothing must be fixed; ")


def test_it_runs_where_only_the_base_package_is_installed(tmp_path: Path) -> None:
    others = [
        "langchain_core",
        "llama_index",
        "haystack",
        "sentence_transformers",
        "fastapi",
        "uvicorn",
        "pyarrow",
        "redis",
        "ray",
    ]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({others!r}))\n"
        "from kalm_integrations.cli import app\n"
        "app(['doctor', '--json'])"
    )
    done = subprocess.run([KALM[0], "-c", code], capture_output=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout)["must_be_fixed"] == 0


@pytest.mark.parametrize(
    ("options", "name", "message"),
    [
        (["--model", "nanno"], "checkpoint", "did you mean 'nano'?"),
        (["--model", "./nowhere"], "checkpoint", "must be an existing folder"),
        (["--model", "."], "files", "must hold config.json"),
        (["--codec", "rot5"], "checkpoint", "storage_codec must be one of"),
        (["--ratio", "0"], "checkpoint", "compression_ratio"),
        (["--device", "cuda:9"], "machine", "device 'cuda:9' was asked for"),
        (["--dtype", "float16"], "machine", "T5Gemma2 overflows in float16"),
        (["--model", "http://127.0.0.1:9"], "checkpoint", "must be reached"),
        (["--model", "nano"], "found", "is not in the hub's cache, and the hub must not be asked"),
    ],
)
def test_what_must_be_fixed_is_said_once(run: Run, cache: Path, options: list[str], name: str, message: str) -> None:
    exit_code, found = examine(run, *options)
    assert exit_code == 1
    assert [found["status"] for found in found.values()].count("must be fixed") == 1
    assert message in found[name]["found"]


def test_a_checkpoint_in_the_cache_is_read_without_asking_for_it(run: Run, tiny_checkpoint: Path, cache: Path) -> None:
    snapshot = put_into(cache, tiny_checkpoint)
    exit_code, found = examine(run, "--model", REPOSITORY)
    assert exit_code == 0
    assert "in the hub's cache" in found["found"]["found"]
    (snapshot / "model.safetensors").unlink()
    exit_code, found = examine(run, "--model", REPOSITORY)
    assert exit_code == 1
    assert found["files"]["remedy"] == "if a fetch was cut short: hf download owner/name"


def test_a_checkpoint_that_the_hub_has_is_not_fetched(run: Run, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [{"rfilename": "model.safetensors", "size": 3_000_000}, {"rfilename": "pytorch_model.bin", "size": 9_000_000}]
    with answering(monkeypatch, 200, {"id": REPOSITORY, "siblings": files}) as asked:
        exit_code, found = examine(run, "--model", REPOSITORY)
    assert exit_code == 0
    assert found["found"]["found"].endswith("the first use fetches 3.0 MB")
    assert [path for path in asked if REPOSITORY in path] == ["/api/models/owner/name?blobs=true"]
    assert not cache.exists()
    with answering(monkeypatch, 200, {"id": REPOSITORY, "siblings": [{"rfilename": "model.safetensors", "size": 10**18}]}):
        exit_code, found = examine(run, "--model", REPOSITORY)
    assert exit_code == 1
    assert "make room" in found["found"]["remedy"]


def test_a_checkpoint_that_the_hub_refuses(run: Run, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(monkeypatch, 404, {"error": "Repository not found"}):
        exit_code, found = examine(run, "--model", REPOSITORY)
    assert exit_code == 1
    assert "the hub refuses it" in found["found"]["found"]
    assert found["hub"]["status"] == "ok"


def test_a_hub_that_keeps_silent_is_given_up(run: Run, model: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        reach(monkeypatch, silent.getsockname()[1])
        exit_code, found = examine(run, *model)
        assert exit_code == 0, "the checkpoint is at hand"
        assert "cannot be reached" in found["hub"]["found"]
        exit_code, found = examine(run, "--model", "nano")
    assert exit_code == 1
    assert f"hf download {ALIASES['nano'].hub_id} --revision" in found["found"]["remedy"]


def test_a_service_is_asked_to_rank(run: Run, make_reranker: Callable[..., KalmReranker]) -> None:
    with serve(make_reranker()) as service:
        exit_code, found = examine(run, "--model", service.url)
    assert exit_code == 0
    assert service.url in found["service"]["found"]
    assert "two passages in" in found["ranking"]["found"]
    assert found["encodings"]["status"] == "note"


def test_stores_with_a_limit_are_compared_with_the_plan(run: Run, cache: Path) -> None:
    _, found = examine(run, "--model", "nano", "--ratio", 1)
    plan = make_plan("nano", 1, 256, ratio=1, speed=1.0)
    assert found["encodings"]["found"].startswith(f"{plan.characters:,} characters")
    for store, room in plan.room.items():
        assert found[store]["status"] == "note"
        assert f"takes {room:,} characters" in found[store]["found"]
        assert f"compression_ratio={plan.finest[store]['rot4']} fits" in found[store]["remedy"]
    _, found = examine(run, "--model", "nano", "--ratio", 32)
    assert {found[store]["status"] for store in plan.room} == {"ok"}


def test_a_check_that_breaks_is_a_finding_and_not_the_end(run: Run, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Iterator[Any]:
        msg = "libcudart.so.12:\ncannot open shared object file"
        raise OSError(msg)
        yield

    monkeypatch.setattr(checkpoint_checks, "_check_files", fail)
    exit_code, found = examine(run, *model)
    assert exit_code == 1
    assert found["checkpoint"]["found"] == "OSError: libcudart.so.12: cannot open shared object file"
    assert "encodings" in found


def test_a_torch_that_cannot_be_imported_is_a_finding() -> None:
    code = "import sys; sys.modules['torch'] = None\nfrom kalm_integrations.cli import app\napp(['doctor', '--json'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=os.environ)
    assert done.returncode == 1
    found = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert found["torch"]["status"] == "must be fixed"
    assert "cannot be imported" in found["torch"]["found"]
