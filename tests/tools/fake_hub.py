"""A hub on this machine: repositories in memory, uploads by LFS and in commits, and downloads, over HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    """Branch -> path -> content."""
    messages: list[str] = field(default_factory=list)
    """Of the commits."""


@dataclass
class FakeHub:
    """What the hub has, and how it answers."""

    url: str = ""
    token: str = "hf_secret"
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Content of LFS files that were uploaded, by SHA-256."""
    requests: list[str] = field(default_factory=list)
    """Method and path, in the order in which they came."""
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Start of a path -> status and message in place of an answer."""


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that listens, with no repository."""
    hub = FakeHub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        refusal = next((answer for start, answer in self.hub.refusals.items() if path.startswith(start)), None)
        if refusal is not None:
            self._send(refusal[0], {"error": refusal[1]})
        elif path.startswith("/lfs/"):
            # Uploads go to a storage that knows no tokens.
            oid = path.removeprefix("/lfs/")
            assert hashlib.sha256(body).hexdigest() == oid
            self.hub.blobs[oid] = body
            self._send(200, {})
        elif self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._send(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            is_valid = "license: nonsense" not in json.loads(body)["content"]
            self._send(*((200, {}) if is_valid else (400, {"errors": [{"message": '"license" must be one of [...]'}]})))
        else:
            self._repository(path, body)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _create(self, asked: dict[str, Any]) -> None:
        repo_id = f"{asked['organization']}/{asked['name']}"
        if repo_id in self.hub.repositories:
            self._send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"})
            return
        self.hub.repositories[repo_id] = Repository(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self._send(200, {"url": f"{self.hub.url}/{repo_id}"})

    def _repository(self, path: str, body: bytes) -> None:
        parts = path.strip("/").removeprefix("api/models/").split("/")
        repo_id = "/".join(parts[:2]).removesuffix(".git")
        repository = self.hub.repositories.get(repo_id)
        if repository is None:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        match parts[2:]:
            case [] | ["revision", _]:
                files = self._files(repository, parts[3] if parts[2:] else "main")
                self._send(
                    200,
                    {
                        "id": repo_id,
                        "sha": COMMIT,
                        "private": repository.private,
                        "siblings": [{"rfilename": name} for name in files],
                    },
                )
            case ["tree", branch]:
                files = self._files(repository, branch)
                self._send(200, [{"type": "file", "path": n, "size": len(c), "oid": _oid(c)} for n, c in files.items()])
            case ["branch", branch]:
                repository.branches.setdefault(branch, dict(repository.branches["main"]))
                self._send(200, {})
            case ["preupload", _]:
                asked = json.loads(body)["files"]
                modes = [
                    {
                        "path": each["path"],
                        "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for each in asked
                ]
                self._send(200, {"files": modes})
            case ["info", "lfs", "objects", "batch"]:
                objects = [
                    {**each, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}}
                    for each in json.loads(body)["objects"]
                ]
                self._send(200, {"transfer": "basic", "objects": objects})
            case ["commit", branch]:
                self._commit(repository, branch, body)
                self._send(200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{COMMIT}", "commitOid": COMMIT})
            case ["resolve", branch, name]:
                content = self._files(repository, branch).get(name)
                if content is None:
                    self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
                else:
                    self._send(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(content)}"'})
            case _:
                self._send(404, {"error": f"{path} is nothing that this hub knows"})

    def _files(self, repository: Repository, revision: str) -> dict[str, bytes]:
        return repository.branches["main" if revision == COMMIT else revision]

    def _commit(self, repository: Repository, branch: str, body: bytes) -> None:
        files = repository.branches[branch]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]

    def _send(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _oid(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
