"""`POST /v1/encodings` with a body of lines (NDJSON): a corpus of any size, answered line by line as it comes in.

A line that is wrong is answered by `{"detail": …}`, and the next ones go on. If the service fails, or the sender is too slow
or sends a line that is too long, such a line is the last. Memory stays bounded: what is read is answered before more is read.
So a client has to read answers while it sends, or to send no more at a time than the network's buffers hold of the answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import NamedTuple

from fastapi import Request, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from kalm_integrations.core.types import Metadata
from kalm_integrations.errors import EncodingError, QueueFullError
from kalm_integrations.remote.protocol import EncodingsAnswer, EncodingsRequest
from kalm_integrations.serving.errors import RETRY_SECONDS, describe, error_body, to_http
from kalm_integrations.serving.guard import NDJSON, HungUpError, RefusedError, check_size
from kalm_integrations.serving.service import Service, note

TEXTS_AT_ONCE = 256
"""Texts of several lines that are encoded together: enough to make batches of similar length."""


class _Line(NamedTuple):
    """A line that was read: its texts, or what is wrong with it."""

    texts: list[str]
    name: str
    problem: str | None


class EncodingStream(Response):
    """Reads lines and answers them until they end."""

    media_type = NDJSON

    def __init__(self, service: Service, request: Request) -> None:
        """Answer a request whose body has not been read.

        Raises:
            HTTPException: the model is not loaded.
        """
        super().__init__()
        del self.headers["content-length"]
        self._service = service
        self._request = request
        self._fingerprint = service.reranker.fingerprint

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        n_documents = 0
        try:
            async for lines in self._read(receive):
                for batch in _together(lines):
                    answers = await self._encode(batch)
                    n_documents += sum(len(line.texts) for line in batch)
                    await self._send(send, b"".join(answers))
        except HungUpError:
            return
        except Exception as error:  # the head is sent: what went wrong can only be said in a line
            detail = error.detail if isinstance(error, RefusedError) else to_http(error)[1]
            await self._send(send, error_body(detail) + b"\n")
        finally:
            note(self._request, n_documents=n_documents)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, body: bytes) -> None:
        """Send some answers; one that takes none of them for long is given up.

        Raises:
            HungUpError: it is.
        """
        self._service.feed()
        try:
            await asyncio.wait_for(
                send({"type": "http.response.body", "body": body, "more_body": True}), self._service.settings.body_seconds
            )
        except asyncio.TimeoutError as error:
            raise HungUpError from error

    async def _read(self, receive: Receive) -> AsyncIterator[list[_Line]]:
        """Return the lines of each piece of the body that completes some."""
        settings = self._service.settings
        rest = bytearray()
        more = True
        while more:
            try:
                message = await asyncio.wait_for(receive(), settings.body_seconds)
            except asyncio.TimeoutError as error:
                raise RefusedError(408, f"a stream must go on within {settings.body_seconds:g} seconds") from error
            if message["type"] == "http.disconnect":
                raise HungUpError
            rest += message.get("body", b"")
            more = message.get("more_body", False)
            *lines, last = bytes(rest).split(b"\n") if b"\n" in rest or not more else [bytes(rest)]
            if lines or not more:
                rest = bytearray(last)
            if not more:
                lines.append(last)
            for line in (*lines, rest):
                check_size(len(line), settings.max_body_bytes)
            yield [self._parse(line) for line in lines if line.strip()]

    def _parse(self, line: bytes) -> _Line:
        try:
            asked = EncodingsRequest.model_validate_json(line)
            self._service.check_count(len(asked.texts))
            return _Line(asked.texts, self._service.name(asked.model), None)
        except ValidationError as error:
            return _Line([], "", describe(error.errors()).replace("the body", "a line"))
        except HTTPException as error:
            return _Line([], "", str(error.detail))

    async def _encode(self, lines: list[_Line]) -> list[bytes]:
        """Return the answers of lines whose texts are encoded together."""
        texts = [text for line in lines for text in line.texts]
        try:
            made = iter(await self._patiently(texts) if texts else [])
        except EncodingError as error:
            if len(lines) == 1:
                return [error_body(str(error)) + b"\n"]
            # One's texts are too long for what the service may store: the others' are not.
            return [answer for line in lines for answer in await self._encode([line])]
        return [self._answer(line, [next(made) for _ in line.texts]) for line in lines]

    async def _patiently(self, texts: list[str]) -> list[Metadata]:
        """Encode texts; where the queue is full, a stream waits."""
        while True:
            try:
                return await self._service.encode(self._request, texts, None)
            except QueueFullError:
                await asyncio.sleep(RETRY_SECONDS[429])

    def _answer(self, line: _Line, encodings: list[Metadata]) -> bytes:
        if line.problem is not None:
            return error_body(line.problem) + b"\n"
        answer = EncodingsAnswer(model=line.name, fingerprint=self._fingerprint, encodings=encodings)
        return answer.model_dump_json().encode() + b"\n"


def _together(lines: list[_Line]) -> Iterator[list[_Line]]:
    """Cut lines into runs of about `TEXTS_AT_ONCE` texts."""
    run: list[_Line] = []
    n_texts = 0
    for line in lines:
        if run and n_texts + len(line.texts) > TEXTS_AT_ONCE:
            yield run
            run, n_texts = [], 0
        run.append(line)
        n_texts += len(line.texts)
    if run:
        yield run
