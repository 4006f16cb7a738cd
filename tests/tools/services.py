"""Our HTTP service: as a process of its own, and within this one, where a test holds its model or reads its parts."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from tools.command_line import KALM

PATIENCE = 60


@dataclass
class Running:
    """A service that runs as a process."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def encoded(self) -> float:
        """How many passages it has encoded."""
        return number(self.url, "kalm_passages_encoded_total")


@contextmanager
def kalm_serve(folder: Path, *arguments: object, command: str = "serve", **environment: str) -> Iterator[Running]:
    """A service on a free port, when it is ready; it is ended in the end, if it has not been.

    The command may be "ui" instead, which takes any port unless it is told one.
    """
    log = folder / "serve.log"
    with log.open("wb") as errors:
        port = ["--port", "0"] if command == "serve" else []
        process = subprocess.Popen(
            [*KALM, command, *port, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
    try:
        found = re.search(r"http://[^/\s]+", process.stdout.readline().decode())
        assert found, log.read_text()
        wait_until_ready(found[0], process)
        yield Running(found[0], process, log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(PATIENCE)
        process.stdout.close()


def wait_until_ready(url: str, process: subprocess.Popen[Any] | None = None) -> None:
    """Return when a service has loaded its model."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and (process is None or process.poll() is None):
        if httpx.get(f"{url}/ready", timeout=PATIENCE).status_code == 200:
            return
        time.sleep(0.02)
    msg = f"the service at {url} is not ready"
    raise RuntimeError(msg)


@contextmanager
def in_process(app: FastAPI, *, waits: bool = True) -> Iterator[str]:
    """The URL of an application that a thread of this process serves."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        if waits:
            wait_until_ready(url)
        yield url
    finally:
        server.should_exit = True
        thread.join(PATIENCE)


def number(url: str, name: str, **labels: str) -> float:
    """Return one of the numbers at /metrics."""
    text = httpx.get(f"{url}/metrics", timeout=PATIENCE).raise_for_status().text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items())
