"""Runs a service: one process, or several workers that share a socket, until a signal says stop."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from kalm_integrations.errors import KalmError, SettingsError
from kalm_integrations.serving.settings import ServiceSettings
from kalm_integrations.tracing import instrument_with_otlp

if TYPE_CHECKING:
    import uvicorn

    from kalm_integrations.core.base import Reranker
    from kalm_integrations.serving.ui.collection import Page

logger = logging.getLogger(__name__)

BACKLOG = 2048
POLL_SECONDS = 0.2
RESTART_SECONDS = 1.0
"""Between the end of a worker and the start of its successor."""

CANNOT_START = 2
"""Exit code of a worker whose model cannot be opened: the next one's could not be either."""


def configure_logging(level: str) -> None:
    """Write what the service and its server log to standard error; the access log is lines of JSON there."""
    plain, access = logging.StreamHandler(), logging.StreamHandler()
    plain.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(plain)
    logging.getLogger("kalm_integrations").setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel(level.upper())
    logger = logging.getLogger("kalm_integrations.access")
    logger.addHandler(access)
    logger.propagate = False


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        SettingsError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        is_taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        remedy = "; end what listens there, or choose another port (--port 0 takes a free one)" if is_taken else ""
        msg = f"host and port must be an address that this machine can listen on, but got {host}:{port} ({error}){remedy}"
        raise SettingsError(msg) from error
    listening.setblocking(False)
    return listening


def url_of(listening: socket.socket) -> str:
    """Return the URL of a socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(settings: ServiceSettings, listening: socket.socket, announce: Callable[[], object]) -> None:
    """Serve until a signal says stop; requests that run are finished, and what is to be stored is written.

    Args:
        settings: of the service.
        listening: where clients come in.
        announce: is called as soon as a signal stops the service well.

    Raises:
        KalmError: the model cannot be opened.
    """
    if settings.workers > 1:
        _Workers(settings, listening).run(announce)
    else:
        serve_here(settings, listening, announce)


def serve_here(
    settings: ServiceSettings,
    listening: socket.socket,
    announce: Callable[[], object] = lambda: None,
    open_reranker: Callable[[ServiceSettings], Reranker] | None = None,
    page: Page | None = None,
) -> None:
    """Serve in this process.

    Args:
        settings: of the service.
        listening: where clients come in.
        announce: is called as soon as a signal stops the service well.
        open_reranker: opens the reranker while the service answers already; None opens the settings' model.
        page: if given, the page of `kalm ui` is there.

    Raises:
        KalmError: the model cannot be opened.
    """
    if settings.traces:
        instrument_with_otlp()
    failures: list[Exception] = []
    servers: list[uvicorn.Server] = []
    is_stopped = threading.Event()

    def stop(_signal: int = 0, _frame: FrameType | None = None) -> None:
        is_stopped.set()
        for server in servers:
            server.should_exit = True

    def fail(error: Exception) -> None:
        failures.append(error)
        stop()

    # uvicorn raises the signal that it stopped for once more in the end, when the exit code is to be 0.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    announce()
    import uvicorn

    from kalm_integrations.serving.app import create_app
    from kalm_integrations.serving.service import open_kalm

    config = uvicorn.Config(
        create_app(settings, open_reranker or open_kalm, on_failure=fail, page=page),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=settings.shutdown_seconds,
    )
    servers.append(uvicorn.Server(config))
    # The signal may have come while all that was imported.
    servers[0].should_exit = is_stopped.is_set()
    servers[0].run(sockets=[listening])
    for error in failures:
        if isinstance(error, KalmError):
            raise error
        msg = f"the model must be one that can be opened, but {type(error).__name__}: {error}"
        raise KalmError(msg) from error


class _Workers:
    """Several processes that accept from one socket; one that dies is replaced."""

    def __init__(self, settings: ServiceSettings, listening: socket.socket) -> None:
        if os.name != "posix":
            msg = f"workers must be 1 where processes cannot share a socket, as on this system, but got {settings.workers}"
            raise SettingsError(msg)
        self._settings = settings
        self._listening = listening
        self._stopping = threading.Event()
        self._processes: list[subprocess.Popen[bytes]] = []

    def run(self, announce: Callable[[], object]) -> None:
        """Run until a signal says stop, or a worker cannot start."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stopping.set())
        announce()
        with tempfile.TemporaryDirectory(prefix="kalm-metrics-") as folder:
            environment = {"PROMETHEUS_MULTIPROC_DIR": folder, **os.environ, **self._settings.to_env()}
            # Each would start as many threads as there are cores.
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self._settings.workers)))
            self._processes = [self._start(environment) for _ in range(self._settings.workers)]
            try:
                while not self._stopping.wait(POLL_SECONDS):
                    self._replace_dead(environment)
            finally:
                self._end()

    def _start(self, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "kalm_integrations.serving.worker", str(self._listening.fileno())]
        # Its standard input ends when this process does, however that ends.
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, env=environment, pass_fds=[self._listening.fileno()], start_new_session=True
        )

    def _replace_dead(self, environment: dict[str, str]) -> None:
        for place, process in enumerate(self._processes):
            code = process.poll()
            if code is None:
                continue
            if code == CANNOT_START:
                msg = "workers must be able to open the model, but one could not; it has said why"
                raise KalmError(msg)
            logger.error("worker %d ended with exit code %d; another one is started", process.pid, code)
            _forget(environment["PROMETHEUS_MULTIPROC_DIR"], process.pid)
            time.sleep(RESTART_SECONDS)
            self._processes[place] = self._start(environment)

    def _end(self) -> None:
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + 2 * self._settings.shutdown_seconds
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _forget(folder: str, pid: int) -> None:
    """Take a worker that is gone out of the gauges."""
    from prometheus_client import multiprocess

    multiprocess.mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]
