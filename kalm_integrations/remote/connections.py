"""Carries conversations out over HTTP: for a thread that waits, or for a coroutine that occupies none.

Connections are kept and used again. A thread's may be used by any thread; a coroutine's belong to its event loop, and are
closed with it. A child process has none of its parent's.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
import weakref
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from kalm_integrations import __version__, tracing
from kalm_integrations.core.forks import ForkSafeLock, renew_in_child
from kalm_integrations.remote.conversation import Conversation, Failure, Pause, Reply, Send

CONNECT_SECONDS = 5.0
"""How long it may take to reach a server."""

AnyTransport = httpx.BaseTransport | httpx.AsyncBaseTransport
Result = TypeVar("Result")


class Connections:
    """The connections to one service."""

    def __init__(self, url: str, api_key: str | None, transport: AnyTransport | None = None) -> None:
        """Connect to nothing yet.

        Args:
            url: the service's address.
            api_key: what it asks for.
            transport: sends the requests instead of sockets; for threads, for coroutines or for both.
        """
        self._url = url
        self._api_key = api_key
        self._transport = transport
        self._lock = ForkSafeLock()
        self._client: httpx.Client | None = None
        self._of_loops: dict[asyncio.AbstractEventLoop, _OfLoop] = {}
        self._inherited: list[object] = []
        """A parent's connections, which a child must not close: both ends would hear of it."""
        renew_in_child(self._renew)

    def run(self, conversation: Conversation[Result]) -> Result:
        """Return what a conversation ends with; the thread waits."""
        came: Any = None
        while True:
            try:
                step = conversation.send(came)
            except StopIteration as end:
                result: Result = end.value
                return result
            came = None
            if isinstance(step, Send):
                came = self._send(step)
            elif isinstance(step, Pause):
                time.sleep(step.seconds)
            else:
                came = step.work()

    async def arun(self, conversation: Conversation[Result]) -> Result:
        """Do the same; no thread waits, and a coroutine that is cancelled hangs up."""
        came: Any = None
        while True:
            try:
                step = conversation.send(came)
            except StopIteration as end:
                result: Result = end.value
                return result
            came = None
            if isinstance(step, Send):
                came = await self._asend(step)
            elif isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
            else:
                came = await asyncio.to_thread(step.work)

    def _send(self, step: Send) -> Reply | Failure:
        if not step.deadline.left:
            return _LATE
        try:
            client = self._sync()
            response = client.send(self._request(client, step), stream=True)
            try:
                body = _Body(step)
                for chunk in response.iter_bytes():
                    body.take(chunk)
                return body.reply(response)
            finally:
                response.close()
        except (httpx.TransportError, httpx.DecodingError, _RefusedError) as error:
            return _failure(error, step)

    async def _asend(self, step: Send) -> Reply | Failure:
        if not step.deadline.left:
            return _LATE
        try:
            client = await self._async()
            response = await client.send(self._request(client, step), stream=True)
            try:
                body = _Body(step)
                async for chunk in response.aiter_bytes():
                    body.take(chunk)
                return body.reply(response)
            finally:
                await response.aclose()
        except (httpx.TransportError, httpx.DecodingError, _RefusedError) as error:
            return _failure(error, step)

    def _request(self, client: httpx.Client | httpx.AsyncClient, step: Send) -> httpx.Request:
        kind = {} if step.content is None else {"content-type": "application/json"}
        url = f"{self._url}{step.path}"
        headers = {**tracing.headers(), **kind}
        extensions = {"timeout": _TimeLeft(step)}
        return client.build_request(step.method, url, content=step.content, headers=headers, extensions=extensions)

    def _sync(self) -> httpx.Client:
        with self._lock:
            if self._client is None:
                transport = self._transport if isinstance(self._transport, httpx.BaseTransport) else None
                self._client = httpx.Client(transport=transport, headers=self._headers())
                weakref.finalize(self, _close_in, os.getpid(), self._client)
            return self._client

    async def _async(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        held = self._of_loops.get(loop)
        if held is None or held.client.is_closed:
            transport = self._transport if isinstance(self._transport, httpx.AsyncBaseTransport) else None
            client = httpx.AsyncClient(transport=transport, headers=self._headers())
            held = _OfLoop(client, _closing(client))
            # The loop knows of it from here on, and ends it when it ends itself.
            await held.life.__anext__()
            with self._lock:
                ended = [other for other in self._of_loops if other.is_closed()]
                for other in ended:
                    del self._of_loops[other]
                self._of_loops[loop] = held
        return held.client

    def _headers(self) -> dict[str, str]:
        # Not compressed: what is sent cannot be larger when it is unpacked.
        headers = {"user-agent": f"kalm-integrations/{__version__}", "accept-encoding": "identity"}
        return headers if self._api_key is None else {**headers, "authorization": f"Bearer {self._api_key}"}

    def _renew(self) -> None:
        self._inherited += [self._client, self._of_loops]
        self._client, self._of_loops = None, {}


@dataclass(frozen=True)
class _OfLoop:
    """What belongs to an event loop."""

    client: httpx.AsyncClient
    life: AsyncGenerator[None, None]


async def _closing(client: httpx.AsyncClient) -> AsyncGenerator[None, None]:
    """Close a client when the event loop shuts its generators down, as `asyncio.run` has it do at the end."""
    try:
        yield
    finally:
        await client.aclose()


def _close_in(process: int, client: httpx.Client) -> None:
    if process == os.getpid():
        client.close()


class _TimeLeft(dict[str, float | None]):
    """Time-outs of httpx's operations: what is left when each begins, so that all together keep to the deadline."""

    def __init__(self, step: Send) -> None:
        self._deadline = step.deadline
        super().__init__({name: self.get(name) for name in ("connect", "read", "write", "pool")})

    def get(self, name: str, default: Any = None) -> Any:
        del default
        left = self._deadline.left
        if name == "connect":
            return min(left, CONNECT_SECONDS)
        return None if left == math.inf else left


_LATE = Failure("it did not answer in time", is_late=True)


class _RefusedError(Exception):
    """A reply that is too long or too late."""


class _Body:
    """The bytes of a reply, as far as they may come."""

    def __init__(self, step: Send) -> None:
        self._step = step
        self._chunks: list[bytes] = []
        self._n_bytes = 0

    def take(self, chunk: bytes) -> None:
        self._n_bytes += len(chunk)
        if self._n_bytes > self._step.max_bytes:
            msg = f"its answer has more than {self._step.max_bytes} bytes"
            raise _RefusedError(msg)
        if not self._step.deadline.left:
            msg = "its answer did not come in time"
            raise _RefusedError(msg)
        self._chunks.append(chunk)

    def reply(self, response: httpx.Response) -> Reply:
        kind = response.headers.get("content-type", "").partition(";")[0].strip()[:40]
        return Reply(response.status_code, kind, response.headers.get("retry-after", ""), b"".join(self._chunks))


def _failure(error: Exception, step: Send) -> Failure:
    if not step.deadline.left:
        return _LATE
    if isinstance(error, _RefusedError):
        return Failure(str(error), may_pass=False)
    return Failure(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
