"""A worker process: serves on a socket that its parent has opened, until the parent says stop or is gone."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable

from kalm_integrations.errors import KalmError
from kalm_integrations.serving.running import CANNOT_START, configure_logging, serve_here
from kalm_integrations.serving.settings import ServiceSettings


def main() -> None:
    """Run a worker; the argument is the socket's number."""
    settings = ServiceSettings.from_env()
    configure_logging(settings.log_level)
    try:
        serve_here(settings, socket.socket(fileno=int(sys.argv[1])), _watch_parent)
    except KalmError as error:
        print(f"kalm: error: {error}", file=sys.stderr)
        sys.exit(CANNOT_START)


def _watch_parent(stop: Callable[[], None]) -> None:
    def watch() -> None:
        # Ends when the parent does.
        sys.stdin.buffer.read()
        stop()

    threading.Thread(target=watch, name="kalm-parent", daemon=True).start()


if __name__ == "__main__":
    main()
