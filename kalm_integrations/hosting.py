"""What every host of rerankers needs once."""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass
from typing import Any

from kalm_integrations.core.types import Reranker
from kalm_integrations.errors import SettingsError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BackfillReport:
    """What an adapter's `backfill` found in a store, and did, in documents."""

    n_checked: int
    """Read from the store."""
    n_missing: int
    """Had no encoding."""
    n_stale: int
    """Had one of another checkpoint, setting or text, or a damaged one."""
    n_failed: int = 0
    """Of the missing and the stale, those that the store did not take; each is in the log."""


def as_reranker(model: Reranker | str | os.PathLike[str], **settings: Any) -> Reranker:
    """Return what an adapter was given as `model` as a reranker: itself if it is one, else `from_pretrained` of it.

    Says once per process that the built-in checkpoint is not the one for production.

    Raises:
        SettingsError: settings were given for a reranker that has its own.
    """
    if not isinstance(model, (str, os.PathLike)):
        given = sorted(name for name, value in settings.items() if value is not None)
        if given:
            msg = (
                f"a reranker given as model brings its own settings, but got {', '.join(given)} too; set them on the reranker"
            )
            raise SettingsError(msg)
        return model
    # torch is loaded here, not when a component is made.
    from kalm_integrations.core.reranker import KalmReranker

    if model == "pico":
        _notice_pico()
    return KalmReranker.from_pretrained(model, **settings)


@functools.cache
def _notice_pico() -> None:
    logger.warning("using the small built-in checkpoint 'pico'; for production pass model='nano' or larger")
