"""One request to a service: its time, its retries, and what its answer means. Who carries it out is told, and tells what came.

A conversation is a generator. It yields steps, is sent what came of each, and returns an answer: threads and coroutines carry
out the same one.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeAlias, TypeVar

from pydantic import BaseModel, ValidationError

from kalm_integrations.core.fallback import too_late
from kalm_integrations.errors import DeadlineExceededError, KalmError, QueueFullError, ServiceError, SettingsError
from kalm_integrations.remote.address import API_KEY_VARIABLE

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 8.0
"""Seconds before a request is sent again; each time twice as long."""
LONGEST_WISH = 60.0
"""Seconds that a service may ask a client without a deadline to stay away."""

MAX_DETAIL = 500
"""Characters of what a service says about an error."""

MAY_PASS = (429, 503)
"""Statuses after which the same request is sent again."""
LOST = (500, 502)
"""What a proxy answers, in words of its own, when the server behind it has died; there may be another one."""

_KEY = (
    SettingsError,
    "be given its API key, but refused what it was given",
    f"set {API_KEY_VARIABLE}, or give RemoteReranker an api_key",
)
_REFUSED = (SettingsError, "be asked for what it has, but refused the request", "check the address and the arguments")
_MEANINGS: dict[int, tuple[type[KalmError], str, str]] = {
    **dict.fromkeys((401, 403), _KEY),
    **dict.fromkeys((400, 404, 405, 415, 422), _REFUSED),
    413: (
        SettingsError,
        "be sent no more than it takes, but refused a request as too large",
        "send shorter passages, or raise the limit of the service or of the proxy before it",
    ),
    429: (QueueFullError, "have room for a request, but too much waits", "ask again later, or start more workers"),
    503: (ServiceError, "be ready, but is not", "ask again later"),
    504: (
        DeadlineExceededError,
        "answer within the time-out that it was started with, but did not",
        "give it more time or fewer candidates, or set on_error='keep_order' to go on with the first stage's order",
    ),
}
"""Statuses: our error, the rule that was broken, and the remedy."""

Answer = TypeVar("Answer", bound=BaseModel)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Deadline:
    """When an answer must have come."""

    seconds: float | None
    """That were given for it, for messages; None: as long as it takes."""
    at: float
    """By `time.monotonic`."""

    @classmethod
    def after(cls, seconds: float | None) -> Deadline:
        """Begin to count."""
        return cls(seconds, math.inf if seconds is None else time.monotonic() + seconds)

    @property
    def left(self) -> float:
        """Seconds that are left, infinite without a deadline."""
        return max(0.0, self.at - time.monotonic())


@dataclass(frozen=True)
class Send:
    """Step: send a request, and return its `Reply` or `Failure`."""

    method: str
    path: str
    content: bytes | None
    deadline: Deadline
    max_bytes: int
    """Of the reply; a longer one is a failure."""


@dataclass(frozen=True)
class Pause:
    """Step: let some time pass."""

    seconds: float


@dataclass(frozen=True)
class Aside:
    """Step: return what a function that computes for a while returns; an event loop goes on meanwhile."""

    work: Callable[[], Any]


Step: TypeAlias = "Send | Pause | Aside"
Conversation: TypeAlias = Generator[Step, Any, Result]


@dataclass(frozen=True)
class Reply:
    """What a server sent."""

    status: int
    kind: str
    """Its media type."""
    retry_after: str
    """The header, or nothing."""
    content: bytes


@dataclass(frozen=True)
class Failure:
    """Why no reply came."""

    reason: str
    is_late: bool = False
    """The deadline has passed."""
    may_pass: bool = True
    """Whether the same request may have an answer the next time."""


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """What a service is asked; it may be asked twice, for no call changes what another one returns."""

    path: str
    answer: type[Answer]
    body: BaseModel | None = None
    max_bytes: int = 2**20
    """Of the answer."""

    @property
    def method(self) -> str:
        """A call with a body is a POST."""
        return "GET" if self.body is None else "POST"


def ask(call: Call[Answer], url: str, deadline: Deadline, max_retries: int) -> Conversation[Answer]:
    """Return a service's answer; what is busy, not ready or not reached is asked again, as long as there is time.

    Args:
        call: the request.
        url: the service's address, for messages.
        deadline: of the answer, retries included.
        max_retries: how often to ask again.

    Raises:
        SettingsError: the service refuses the request.
        QueueFullError: too much waits there.
        DeadlineExceededError: the answer did not come in time.
        ServiceError: there is no service, or its answer is none.
    """
    content = None if call.body is None else call.body.model_dump_json(exclude_defaults=True).encode()
    for n_retries in range(max_retries + 1):
        came = yield Send(call.method, call.path, content, deadline, call.max_bytes)
        if isinstance(came, Reply) and came.status == 200:
            return _read(came, call.answer, url)
        if isinstance(came, Failure) and came.is_late:
            raise too_late(deadline.seconds)
        error, may_pass = _judge(came, url)
        if n_retries == max_retries or not may_pass:
            raise error
        seconds = _pause(came, n_retries, deadline)
        if seconds >= deadline.left:
            raise too_late(deadline.seconds) from error
        yield Pause(seconds)
    raise AssertionError  # the last turn returns or raises


def not_ours(url: str, what: str) -> ServiceError:
    """Return the error for an answer that is none of `kalm serve`."""
    msg = (
        f"{url} must answer as `kalm serve` of this version does, but {what}; check the address, the path that a proxy puts "
        "before it, and the version of the service"
    )
    return ServiceError(msg)


def _read(reply: Reply, kind: type[Answer], url: str) -> Answer:
    try:
        return kind.model_validate_json(reply.content)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"]))
        what = f"sent {len(reply.content)} bytes of {reply.kind or 'no media type'}: {place and place + ': '}{problem['msg']}"
        raise not_ours(url, what) from error


def _judge(came: Reply | Failure, url: str) -> tuple[KalmError, bool]:
    """Return the error for what came instead of an answer, and whether it may pass."""
    if isinstance(came, Failure):
        reached = f"the service at {url} must be reached, but {came.reason}"
        return ServiceError(f"{reached}; check the address, and whether `kalm serve` runs there"), came.may_pass
    detail = _detail(came)
    said = f"{came.status}{': ' if detail else ''}{detail}"
    if came.status not in _MEANINGS:
        return not_ours(url, f"sent status {said}"), came.status in LOST and not detail
    kind, rule, remedy = _MEANINGS[came.status]
    return kind(f"the service at {url} must {rule} ({said}); {remedy}"), came.status in MAY_PASS


def _detail(reply: Reply) -> str:
    """Return what a service says about an error, on one line."""
    try:
        detail = json.loads(reply.content)["detail"]
        if isinstance(detail, list):
            # FastAPI's own form: the place, and what is wrong with it.
            detail = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in detail)
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
    text = " ".join(str(detail).split())
    return text if len(text) <= MAX_DETAIL else f"{text[:MAX_DETAIL]}…"


def _pause(came: Reply | Failure, n_retries: int, deadline: Deadline) -> float:
    """Return the seconds to wait: some, so that clients that were refused together do not come back together, or more."""
    longest: float = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(n_retries, 10))
    seconds = longest * random.uniform(0.5, 1)
    wished = _seconds(came.retry_after) if isinstance(came, Reply) else 0.0
    return max(seconds, min(wished, LONGEST_WISH) if deadline.seconds is None else wished)


def _seconds(retry_after: str) -> float:
    """Return what a Retry-After header asks for: seconds, or a date; 0 for anything else."""
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after[:9])
    try:
        return max(0.0, float(parsedate_to_datetime(retry_after).timestamp()) - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
