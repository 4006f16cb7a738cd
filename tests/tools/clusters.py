"""A Ray cluster on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil
import pytest
import ray

ATTEMPTS = 3
"""Now and then a raylet does not come up, which Ray notices after 30 seconds."""


@contextlib.contextmanager
def ray_cluster(n_cpus: int) -> Iterator[None]:
    """Start a cluster without dashboard, which leaves no process behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # no token in the home folder
        try:
            _start(n_cpus)
            yield
        finally:
            ray.shutdown()
    assert not [child for child in psutil.Process().children(recursive=True) if "ray" in child.name()]


def _start(n_cpus: int) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            ray.init(num_cpus=n_cpus, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
        except Exception as error:
            if attempt == ATTEMPTS or "timed out during startup" not in str(error):
                raise
            ray.shutdown()
        else:
            return
