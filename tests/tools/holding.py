"""A model that is kept busy until a test lets it go."""

from __future__ import annotations

import threading

from typing_extensions import Self

from kalm_integrations import KalmReranker
from kalm_integrations.core.jobs import Job, Work


class Held:
    """Occupies the engine of a reranker; use as a context manager, or release it."""

    def __init__(self, reranker: KalmReranker) -> None:
        """Return when the engine is busy."""
        self.gate = threading.Event()
        started = threading.Event()

        def wait(items: list[None]) -> list[None]:
            started.set()
            self.gate.wait()
            return items

        self.job = Job(Work(wait, 1), [None])
        reranker.runtime.engine.submit(self.job)
        assert started.wait(60)

    def release(self) -> None:
        """Let the engine go on."""
        self.gate.set()
        self.job.result(60)

    def __enter__(self) -> Self:
        """Do nothing: it is held already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let it go."""
        self.release()
