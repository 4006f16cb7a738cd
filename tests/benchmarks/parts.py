"""Where the seconds of a pass go, by the function that they are spent in."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from kalm_integrations.core.model import decoder, layers, packing
from kalm_integrations.core.model.kv_cache import GatheredKVCache, PaddedKVCache

REST = "rest"
FUNCTIONS: dict[str, tuple[tuple[Any, str], ...]] = {
    "matrix products": ((layers, "linear"), (packing, "multiply_gated")),
    "attention": ((decoder, "attend"),),
    "norms": ((layers, "rms_norm"), (layers, "add_rms_norm"), (decoder, "rms_norm")),
    "rotations": ((layers, "rotate"),),
    "keys and values put together": ((PaddedKVCache, "append"), (GatheredKVCache, "append")),
}
"""The functions of each part, none of which calls another on a CPU; packed matrices compute the
gate's activation with its product."""


def timed_parts(run: Callable[[], object]) -> dict[str, float]:
    """Run once and return the wall seconds of each part; `rest` is what lies between them."""
    seconds = dict.fromkeys(FUNCTIONS, 0.0)

    def clocked(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments)
            seconds[part] += time.perf_counter() - started
            return result

        return call

    with ExitStack() as stack:
        for part, functions in FUNCTIONS.items():
            for owner, name in functions:
                stack.enter_context(patch.object(owner, name, clocked(part, getattr(owner, name))))
        started = time.perf_counter()
        run()
        whole = time.perf_counter() - started
    return {**seconds, REST: whole - sum(seconds.values())}
