"""One line of JSON for each request, and its numbers for Prometheus. No texts, no queries, no keys."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Container

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kalm_integrations.serving.errors import HUNG_UP, INTERNAL, error_response
from kalm_integrations.serving.service import NOTES, Service

access = logging.getLogger("kalm_integrations.access")
logger = logging.getLogger(__name__)

PROBES = frozenset({"/health", "/ready", "/metrics"})
"""What monitoring asks for every few seconds is logged under debug only."""


class AccessLog:
    """Logs and counts the requests of an application, and answers for what it does not catch."""

    def __init__(self, app: ASGIApp, *, service: Service, endpoints: Container[str]) -> None:
        """Log what an application does; other paths than `endpoints` are counted together."""
        self._app = app
        self._service = service
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        metrics = self._service.metrics
        endpoint = scope["path"] if scope["path"] in self._endpoints else "other"
        started = time.perf_counter()
        statuses: list[int] = []

        def count(status: int) -> None:
            statuses.append(status)
            metrics.requests.labels(endpoint, str(status)).inc()

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Before the client can ask for the numbers.
                self._service.feed()
                count(message["status"])
            await send(message)

        metrics.in_progress.inc()
        try:
            await self._app(scope, receive, observed)
        except Exception:
            logger.exception("a request failed")
            if statuses:
                raise  # the client sees a connection that is cut off
            await error_response(500, INTERNAL)(scope, receive, observed)
        finally:
            metrics.in_progress.dec()
            if not statuses:
                count(HUNG_UP)
            seconds = time.perf_counter() - started
            metrics.seconds.labels(endpoint).observe(seconds)
            facts = {"method": scope["method"], "path": scope["path"], "status": statuses[0], "seconds": round(seconds, 6)}
            level = logging.DEBUG if endpoint in PROBES else logging.INFO
            access.log(level, "%s", json.dumps({**facts, **scope.get(NOTES, {})}))
