"""The cluster: being connected to it, its room, its errors, and the one run that a folder may have on it."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import ray

from kalm_integrations.bulk.rows import RowCounts
from kalm_integrations.errors import EngineError, KalmError, SettingsError

LEASE_SECONDS = 30.0
"""How long a run waits for another that writes into its folder: that a driver was killed is noticed after some seconds."""

CONNECT_SECONDS = 10.0
"""How long a cluster may take to answer."""

_NAMESPACE = "kalm_integrations"


class _Run:
    """What actors tell of a run. Its name is the folder's, so that no second run can have one: it ends with its driver."""

    def __init__(self) -> None:
        self._total = RowCounts()
        self._failure: KalmError | None = None

    def fail(self, failure: KalmError) -> None:
        """Take what ends the run."""
        self._failure = failure

    def failure(self) -> KalmError | None:
        """Return what has ended the run."""
        return self._failure

    def add(self, counts: RowCounts) -> None:
        """Take what an actor has done."""
        self._total = self._total.plus(counts)

    def total(self) -> RowCounts:
        """Return what all have done."""
        return self._total


def fit_actors(actors: int | None, num_cpus: float, num_gpus: float, spare_cpus: int) -> int:
    """Return how many actors a run gets; by default as many as the cluster has room for.

    Args:
        actors: as they were asked for.
        num_cpus: cores of each.
        num_gpus: GPUs of each.
        spare_cpus: cores for the tasks beside them. Without a core for those, actors and tasks would wait for ever.

    Raises:
        SettingsError: there is no room for them.
    """
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = there.get("CPU", 0.0), there.get("GPU", 0.0)
    room = int((cpus - spare_cpus) / num_cpus)
    if num_gpus:
        room = min(room, int(gpus / num_gpus))
    if room < (actors or 1):
        msg = (
            f"the cluster must have room for {actors or 1} actors of {num_cpus:g} cores and {num_gpus:g} GPUs, and beside "
            f"them {spare_cpus} cores that read and write, but has {cpus:g} cores and {gpus:g} GPUs; ask for fewer actors, or "
            "add nodes first"
        )
        raise SettingsError(msg)
    return actors or room


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Be connected to a cluster, and no longer than before.

    Raises:
        SettingsError: it is not there.
    """
    if ray.is_initialized():
        yield
        return
    where = address or os.environ.get("RAY_ADDRESS") or "this machine"
    try:
        _check_answers(where)
        ray.init(address=address)
    except (OSError, ValueError, RuntimeError) as error:
        msg = f"address must be that of a running Ray cluster, such as 10.0.0.1:6379, but {where} cannot be reached: {error}"
        raise SettingsError(msg) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Check that somebody listens at an address of host and port, which Ray would go on trying for minutes.

    Raises:
        OSError: nobody does.
    """
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()


@contextmanager
def leased(folder: str) -> Iterator[Any]:
    """Give a run what counts for it, which no other run on the same folder has meanwhile.

    Raises:
        SettingsError: another run has it, and does not end.
    """
    name = hashlib.sha256(folder.encode()).hexdigest()
    end = time.monotonic() + LEASE_SECONDS
    while True:
        try:
            run: Any = ray.remote(num_cpus=0)(_Run).options(name=name, namespace=_NAMESPACE).remote()
            break
        except ValueError as error:
            if time.monotonic() > end:
                msg = f"one run at a time may write into a folder, but another writes into {folder!r}; wait for its end"
                raise SettingsError(msg) from error
            time.sleep(1.0)
    try:
        yield run
    finally:
        ray.kill(run)


@contextmanager
def failures_told(run: Any) -> Iterator[None]:
    """Raise what an actor told of its failure: Ray brings the text of it, but not the error.

    Raises:
        KalmError: of an actor.
    """
    try:
        yield
    except Exception as error:
        failure = ray.get(run.failure.remote())
        if failure is None:
            raise
        raise failure from error


@contextmanager
def early_ends_explained() -> Iterator[None]:
    """Raise what is wrong instead of what Ray wraps around it; what Ray itself has to say of it goes to its log file only.

    Raises:
        KalmError: of an actor or a reader.
        EngineError: an actor cannot start, or Ray has failed.
    """
    consoles = [handler for handler in logging.getLogger("ray.data").handlers if handler.get_name() == "console"]
    for handler in consoles:
        handler.addFilter(_is_no_error)
    try:
        yield
    # Ray's errors are KalmErrors, too, where one is the cause.
    except (ray.exceptions.RayError, pa.ArrowException, OSError, RuntimeError) as error:
        ours = (cause for cause in _causes(error) if isinstance(cause, KalmError))
        cause = next((cause for cause in ours if not isinstance(cause, ray.exceptions.RayError)), None)
        if cause is error:
            raise
        if cause is not None:
            raise cause from error
        # The first lines are stacks of other processes.
        reason = str(error).strip().splitlines()[-1]
        msg = f"the run on Ray ended early, and goes on if it is started again: {reason}"
        raise EngineError(msg) from error
    finally:
        for handler in consoles:
            handler.removeFilter(_is_no_error)


def _is_no_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
