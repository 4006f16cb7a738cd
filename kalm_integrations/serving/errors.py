"""How errors are answered: one table of statuses, and always `{"detail": "…"}` with a string, as the clients expect."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from kalm_integrations.errors import (
    DeadlineExceededError,
    EncodingError,
    EngineError,
    KalmError,
    OutOfMemoryError,
    PassError,
    QueueFullError,
    SettingsError,
)

logger = logging.getLogger(__name__)

STATUSES: dict[type[BaseException], int] = {
    SettingsError: 422,
    EncodingError: 422,
    QueueFullError: 429,
    DeadlineExceededError: 504,
    OutOfMemoryError: 500,
    PassError: 500,
    EngineError: 503,
    KalmError: 500,
}
"""The status of an error is that of the nearest of its classes."""

MEANINGS = {
    400: "The body cannot be read.",
    401: "The key is missing or wrong.",
    404: "The model has another name.",
    408: "The body did not come in time.",
    413: "The body is too large, or holds too many texts, or one that is longer than is read and must not be cut.",
    422: "The body breaks a rule.",
    429: "Too much waits already; ask again after the seconds in Retry-After.",
    500: "The service failed; its log says why.",
    503: "The model is still being loaded; ask again after the seconds in Retry-After.",
    504: "The answer did not come in time.",
}
"""What the statuses mean, for the description of the service."""

RETRY_SECONDS = {429: 1, 503: 2}
"""After which it is worth asking again."""

HUNG_UP = 499
"""Logged and counted for a client that did not wait for its answer; nobody receives it."""

MAX_PROBLEMS = 3
"""Of a body, that a message names."""

INTERNAL = "the service failed; its log says why"


class Problem(BaseModel):
    """What is wrong."""

    detail: str


ResponsesByStatus = dict[int | str, dict[str, Any]]


def documented(*statuses: int) -> ResponsesByStatus:
    """Return the description of errors that an endpoint may answer; of all, if none are given."""
    return {status: {"description": MEANINGS[status], "model": Problem} for status in statuses or MEANINGS}


def status_of(error: BaseException) -> int:
    """Return the status by which an error is answered."""
    return next((STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES), 500)


def to_http(error: BaseException) -> tuple[int, str]:
    """Return status and message for an error; one that the client can do nothing about is logged instead of told."""
    status = status_of(error)
    if status == 500:
        logger.error("a request failed", exc_info=error)
        return status, INTERNAL
    return status, str(error)


def error_headers(status: int) -> dict[str, str]:
    """Return what is said in the head of an answer that is an error."""
    headers = {"content-type": "application/json"}
    if status in RETRY_SECONDS:
        headers["retry-after"] = str(RETRY_SECONDS[status])
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def error_body(detail: str) -> bytes:
    """Return an error as JSON; in ASCII, which lone surrogates out of a body fit into."""
    return json.dumps({"detail": detail}).encode()


def error_response(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return an error as an answer."""
    return Response(error_body(detail), status, {**(headers or {}), **error_headers(status)})


def describe(problems: Iterable[Mapping[str, Any]]) -> str:
    """Return pydantic's findings in one line, without what was sent."""
    lines = []
    for problem in problems:
        place = ".".join(str(part) for part in problem["loc"] if part not in ("body", "texts_body", "documents_body"))
        message = str(problem["msg"]).removeprefix("Value error, ")
        if problem["type"] == "json_invalid":
            place, message = "", f"the body must be valid JSON, but it is not: {problem.get('ctx', {}).get('error', message)}"
        lines.append(f"{place[:100]}: {message}" if place else message)
    more = f"; and {len(lines) - MAX_PROBLEMS} more" if len(lines) > MAX_PROBLEMS else ""
    return "; ".join(lines[:MAX_PROBLEMS]) + more


def answer_errors(app: FastAPI) -> None:
    """Have an application answer all errors in our form."""

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> Response:
        if "json" not in request.headers.get("content-type", ""):
            return error_response(422, "the body must be JSON, with the header Content-Type: application/json")
        return error_response(422, describe(error.errors()))

    @app.exception_handler(HTTPException)
    async def _(_request: Request, error: HTTPException) -> Response:
        return error_response(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(KalmError)
    async def _(_request: Request, error: KalmError) -> Response:
        return error_response(*to_http(error))
