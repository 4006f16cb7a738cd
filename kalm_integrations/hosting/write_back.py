"""Write-back of all hosts: one queue for the process, so that a store sees one write at a time, in order."""

from __future__ import annotations

from collections.abc import Callable

from kalm_integrations.core.write_queue import WriteBackStats, WriteQueue

__all__ = ["WriteBackStats", "hand_over", "wait_for_write_back", "write_back_stats"]

_queue = WriteQueue()


def hand_over(target: object, n_documents: int, work: Callable[[], object]) -> None:
    """Let a write be done in the background, after those that were handed over before; see `WriteQueue.add`."""
    _queue.add(target, n_documents, work)


def wait_for_write_back(timeout: float | None = None) -> bool:
    """Wait until what queries have handed over so far is written, for tests and at the end of scripts.

    The end of the process waits by itself, for ten seconds at most. Coroutines await `asyncio.to_thread(wait_for_write_back)`.

    Args:
        timeout: seconds to wait at most; None waits until all is over. A write that hangs is given up after 30 seconds.

    Returns:
        False if the time was not enough. True says that nothing is left to do: a write that failed or was given up is in the
        log and in `write_back_stats`.

    Raises:
        SettingsError: `timeout` is no number of seconds.
    """
    return _queue.wait(timeout)


def write_back_stats() -> WriteBackStats:
    """Return what has become of what queries handed over, in this process since it began."""
    return _queue.stats()
