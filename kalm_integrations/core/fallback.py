"""What is returned when a reranker fails or is late, if the caller would rather go on with the first stage's order."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias, get_args

from kalm_integrations.core.types import Passage, RankedPassage, Ranking, Reading, as_number, shown
from kalm_integrations.errors import DeadlineExceededError, EncodingError, SettingsError

logger = logging.getLogger(__name__)

OnError: TypeAlias = Literal["raise", "keep_order"]
"""What to do when a reranker fails or is late: raise the error, or keep the first stage's order."""

_failing: set[type[Exception]] = set()
"""Kinds of failure that were logged since the last answer."""


def check_on_error(on_error: object) -> None:
    """Check what is to be done about a failure.

    Raises:
        SettingsError: it is no `OnError`.
    """
    if not isinstance(on_error, str) or on_error not in get_args(OnError):
        msg = f"on_error must be one of {', '.join(get_args(OnError))}, but got {shown(on_error)}"
        raise SettingsError(msg)


def check_timeout(timeout: object) -> float | None:
    """Return a time-out in seconds; None waits as long as it takes.

    Raises:
        SettingsError: it is no positive number.
    """
    if timeout is None:
        return None
    seconds = as_number(timeout)
    if not 0 < seconds < math.inf:
        msg = f"timeout must be a positive number of seconds, or None to wait as long as it takes, but got {shown(timeout)}"
        raise SettingsError(msg)
    # Centuries; what is longer overflows in a lock.
    return min(seconds, threading.TIMEOUT_MAX)


def keep_order(error: Exception, on_error: OnError, passages: Iterable[Any] | Reading, top_k: int | None) -> Ranking:
    """Return passages as they came if an error is to be borne, and log why, once for each kind until an answer comes again.

    Mistakes of the caller are not: a setting that breaks a rule, or documents without encodings under on_missing="error".

    Args:
        error: what was raised instead of a ranking.
        on_error: what the caller wants.
        passages: what was to be ranked.
        top_k: how many to return at most; None returns all.

    Raises:
        Exception: the error, if it is not to be borne.
    """
    if on_error == "raise" or isinstance(error, (SettingsError, EncodingError)):
        raise error
    if type(error) not in _failing:
        _failing.add(type(error))
        logger.warning(
            "reranking failed, and the first stage's order is kept (logged once until it works again): %s: %s",
            type(error).__name__,
            error,
        )
    return _unranked(passages, top_k)


def too_late(timeout: float | None) -> DeadlineExceededError:
    """Return the error for an answer that did not come in `timeout` seconds."""
    msg = (
        f"an answer must come within timeout={timeout} seconds, but did not; give more time or fewer candidates, encode at "
        "ingest, or set on_error='keep_order' to go on with the first stage's order"
    )
    return DeadlineExceededError(msg)


def note_answer() -> None:
    """Have the next failure logged."""
    if _failing:
        _failing.clear()


def _unranked(passages: Iterable[Any] | Reading, top_k: int | None) -> Ranking:
    """Return passages in the order in which they came, unscored, the first `top_k` of them."""
    texts = passages.texts if isinstance(passages, Reading) else [_text(passage) for passage in passages]
    rows = [RankedPassage(index, math.nan, math.nan, None, text) for index, text in enumerate(texts)]
    return Ranking(rows[:top_k], Reading((), (), (), {}, "", {}), reranked=False)


def _text(passage: Any) -> str | None:
    text = passage.text if isinstance(passage, Passage) else passage
    return text if isinstance(text, str) else None
