"""PyTorch's threads on a CPU, and how those of one Python thread slow down another's.

Every Python thread that computes in PyTorch gets helper threads of its own, which stay with it. GNU's OpenMP counts the
helpers of a process: as soon as threads and helpers outnumber the cores, none of them waits awake for its next piece of work,
and every operator of every thread begins by waking somebody. A program that does nothing but encode lets the helpers of the
thread that waits for the model go.

Queries are not worth that: a short one takes longer with new helpers than with sleepy ones, and where several processes share
the cores, threads that wait awake hold up the others' queries.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from kalm_integrations.core.forks import renew_in_child

_SOFT_PAUSE = 1


def release_helpers() -> None:
    """Let the calling thread's helper threads go, where they are GNU's."""
    # In a child process the helpers of the thread that was forked exist on paper only: who waits for them waits for ever.
    # Without PyTorch, as with a service's model, there are none.
    if "torch" in sys.modules and threading.get_ident() != _forked.ident:
        _pause()(_SOFT_PAUSE)


class _ForkedThread:
    """The thread that this process was forked on, if it was."""

    def __init__(self) -> None:
        self.ident: int | None = None
        renew_in_child(self._note)

    def _note(self) -> None:
        self.ident = threading.get_ident()


_forked = _ForkedThread()


@functools.cache
def _pause() -> Callable[[int], object]:
    """Return GNU's `omp_pause_resource_all` (OpenMP 5.0), or what does nothing: other OpenMPs stop all threads' helpers."""
    for file in sorted((Path(str(sys.modules["torch"].__file__)).parent / "lib").glob("libgomp*")):
        try:
            # The one that PyTorch has loaded, not another one.
            library = ctypes.CDLL(str(file), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            pause: Callable[[int], object] = library.omp_pause_resource_all
        except (OSError, AttributeError):
            continue
        return pause
    return lambda _: None
