"""What stands between the network and the endpoints: the key, the size of bodies and their time, and clients that hang up."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
from collections.abc import Container
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kalm_integrations.remote.protocol import ENCODINGS_PATH
from kalm_integrations.serving.errors import error_body, error_headers

OPEN_PATHS = frozenset({"/health", "/ready", "/docs", "/openapi.json"})
"""What is answered without a key: they say nothing about models, texts or load."""

NDJSON = "application/x-ndjson"

BODIES = 8
"""How many bodies of the largest size may be held at a time; small ones are never so many."""

LINGER_SECONDS = 10.0
"""How long what is left of a refused body is read, so that its sender gets to read the refusal."""


class RefusedError(Exception):
    """A request that no endpoint is to see."""

    def __init__(self, status: int, detail: str) -> None:
        """Say how to answer."""
        super().__init__(detail)
        self.status = status
        self.detail = detail


class HungUpError(Exception):
    """The client is gone."""


def digest(key: str) -> bytes:
    """Return what of a key is kept and compared: comparing it says nothing about the key's length either."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def header(scope: Scope, name: bytes) -> str:
    """Return a header of a request, empty if it has none."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def is_stream(scope: Scope) -> bool:
    """Return whether a request's body is to be read line by line."""
    return scope["path"] == ENCODINGS_PATH and header(scope, b"content-type").partition(";")[0].strip().lower() == NDJSON


def check_size(size: int, max_bytes: int) -> None:
    """Check a body's size.

    Raises:
        RefusedError: it is too large.
    """
    if size > max_bytes:
        raise RefusedError(413, f"a body must have at most {max_bytes:,} bytes, but has more; send fewer documents at a time")


class Guard:
    """Lets requests pass that carry the key and a body within bounds, and cancels those whose client hangs up."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        key: str | None,
        max_body_bytes: int,
        body_seconds: float,
        open_paths: Container[str] = OPEN_PATHS,
    ) -> None:
        """Guard an application; without a key everybody may ask, and anyway for `open_paths`."""
        self._app = app
        self._open_paths = open_paths
        self._digest = None if key is None else digest(key)
        self._max_body_bytes = max_body_bytes
        self._body_seconds = body_seconds
        self._n_held = 0
        """Bytes of the bodies that are being received or answered."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        parts: list[bytes] = []
        try:
            self._check_key(scope)
            if is_stream(scope):
                await self._app(scope, receive, send)
                return
            length = header(scope, b"content-length")
            check_size(int(length) if length.isdigit() else 0, self._max_body_bytes)
            await self._read(receive, parts)
            await self._run(scope, b"".join(parts), receive, send)
        except RefusedError as refusal:
            await _refuse(refusal, receive, send)
        except HungUpError:
            return
        finally:
            self._n_held -= sum(map(len, parts))

    async def _read(self, receive: Receive, parts: list[bytes]) -> None:
        """Read a whole body, and add its parts to a list.

        Raises:
            RefusedError: it is too large or too slow, or all bodies together are too large.
            HungUpError: the client is gone.
        """

        async def read() -> None:
            size, more = 0, True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise HungUpError
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                self._n_held += len(parts[-1])
                check_size(size, self._max_body_bytes)
                if self._n_held > BODIES * self._max_body_bytes:
                    raise RefusedError(429, "too many bytes of bodies wait for their answers; ask again soon")
                more = message.get("more_body", False)

        try:
            await asyncio.wait_for(read(), self._body_seconds)
        except asyncio.TimeoutError as error:
            raise RefusedError(408, f"a body must arrive within {self._body_seconds:g} seconds, but did not") from error

    def _check_key(self, scope: Scope) -> None:
        """Check the key: after `Bearer`, or alone, as some clients of TEI send it.

        Raises:
            RefusedError: it is missing or wrong.
        """
        if self._digest is None or scope["path"] in self._open_paths:
            return
        given = header(scope, b"authorization").strip()
        kind, _, key = given.partition(" ")
        if not hmac.compare_digest(digest(key.strip() if kind.lower() == "bearer" else given), self._digest):
            raise RefusedError(401, "Authorization must be 'Bearer KEY' with the service's key, but is missing or wrong")

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Run an endpoint until it has answered, or the client is gone."""
        watching = asyncio.ensure_future(_wait_for_hang_up(receive))
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            if not messages:
                await asyncio.shield(watching)
                return {"type": "http.disconnect"}
            return messages.pop()

        answering: asyncio.Future[Any] = asyncio.ensure_future(self._app(scope, replay, send))
        try:
            await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            if not answering.done():
                answering.cancel()
        try:
            await answering
        except asyncio.CancelledError:
            # Who hung up gets no answer; who cancels this task is told by the wait above.
            return


async def _wait_for_hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refuse(refusal: RefusedError, receive: Receive, send: Send) -> None:
    """Refuse a request. A connection that is closed on data that nobody has read is reset, and the refusal may be lost."""
    body = error_body(refusal.detail)
    headers = {**error_headers(refusal.status), "content-length": str(len(body)), "connection": "close"}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body, "more_body": True})

    async def discard() -> None:
        while (message := await receive())["type"] != "http.disconnect" and message.get("more_body", False):
            pass

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(discard(), LINGER_SECONDS)
    await send({"type": "http.response.body", "body": b"", "more_body": False})
