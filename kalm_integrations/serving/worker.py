"""A worker process: serves on a socket that its parent has opened, until the parent says stop or is gone.

It accepts nobody before its model is loaded: clients wait, or another worker has them.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading

from kalm_integrations.errors import KalmError
from kalm_integrations.serving.running import CANNOT_START, configure_logging, serve_here
from kalm_integrations.serving.service import open_kalm
from kalm_integrations.serving.settings import ServiceSettings


def main() -> None:
    """Run a worker; the argument is the socket's number."""
    threading.Thread(target=_watch_parent, name="kalm-parent", daemon=True).start()
    settings = ServiceSettings.from_env()
    configure_logging(settings.log_level)
    try:
        reranker = open_kalm(settings)
        reranker.warm_up()
        serve_here(settings, socket.socket(fileno=int(sys.argv[1])), open_reranker=lambda _: reranker)
    except KalmError as error:
        print(f"kalm: error: {error}", file=sys.stderr)
        sys.exit(CANNOT_START)


def _watch_parent() -> None:
    # Standard input ends when the parent does. Not by sys.stdin, whose lock would be held at the end of this process.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
