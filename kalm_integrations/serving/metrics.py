"""What Prometheus reads: of one process, or of several workers, which share the folder PROMETHEUS_MULTIPROC_DIR."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
    multiprocess,
)

from kalm_integrations.core.base import Reranker
from kalm_integrations.core.types import RuntimeStats
from kalm_integrations.errors import StoreError

if TYPE_CHECKING:
    from kalm_integrations.core.reranker import KalmReranker

SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable by which prometheus_client shares numbers; it counts when that is imported."""

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

COUNTED = {
    "passages_encoded": ("kalm_passages_encoded", "Passages that went through the encoder."),
    "passages_scored": ("kalm_pairs_scored", "Pairs of query and passage that went through the decoder."),
    "cache_misses": ("kalm_encodings_missed", "Passages whose encoding was found nowhere."),
    "stale": ("kalm_encodings_stale", "Encodings sent by a client that belong to another checkpoint, setting or text."),
    "corrupt": ("kalm_encodings_corrupt", "Encodings sent by a client that are none, or damaged."),
    "truncated": ("kalm_passages_truncated", "Passages that were not read to the end when they were encoded."),
    "windowed": ("kalm_passages_windowed", "Passages that were encoded in several windows."),
    "prefix_hits": ("kalm_prefix_hits", "Pairs scored from prefix states in memory."),
    "prefix_misses": ("kalm_prefix_misses", "Pairs whose prefix states had to be computed."),
    "store_writes": ("kalm_store_writes", "Encodings written to the store."),
    "store_evictions": ("kalm_store_evictions", "Encodings deleted from the store to keep to its bound."),
    "store_failures": ("kalm_store_failures", "Calls of the store that failed or were slow."),
}
"""Counters of `RuntimeStats`, the names that they have here, and what they count."""


def as_kalm(reranker: Reranker) -> KalmReranker | None:
    """Return a reranker that has an engine and a store of its own as what it is; None for others."""
    # Loads torch, which a reranker that needs it has done.
    from kalm_integrations.core.reranker import KalmReranker

    return reranker if isinstance(reranker, KalmReranker) else None


class Metrics:
    """The numbers of one application."""

    def __init__(self) -> None:
        """Start at nothing."""
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry()
        self._is_shared = SHARED_FOLDER in os.environ
        if not self._is_shared:
            ProcessCollector(registry=registry)
            # Under Ray another replica may answer each time, and two may have begun in the same hundredth of a second.
            Gauge("kalm_process_id", "The process that answers.", registry=registry).set(os.getpid())
        self.requests = Counter("kalm_requests", "Requests answered.", ["endpoint", "status"], registry=registry)
        self.seconds = Histogram(
            "kalm_request_seconds", "From a request's head to the end of its answer.", ["endpoint"],
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.in_progress = self._gauge("kalm_requests_in_progress", "Requests that are being answered.")
        self.ready = self._gauge("kalm_ready", "Workers whose model is loaded.")
        self._queue = self._gauge("kalm_queue_items", "Pairs to score and passages to encode that wait or are computed.")
        self._store_bytes = Gauge(
            "kalm_store_bytes", "Bytes of the store's encodings.", multiprocess_mode="livemax", registry=registry
        )
        self._batches = Counter("kalm_batches", "Batches computed.", registry=registry)
        self._found = Counter(
            "kalm_encodings_found", "Passages whose encoding was there, by where.", ["where"], registry=registry
        )
        self._stages = Counter("kalm_stage_seconds", "Seconds of computing, by stage.", ["stage"], registry=registry)
        for where in ("metadata", "memory", "store"):
            self._found.labels(where)
        for stage in ("encode", "score"):
            self._stages.labels(stage)
        self._counters = {field: Counter(name, what, registry=registry) for field, (name, what) in COUNTED.items()}
        self._seen = RuntimeStats()
        self._n_batches = 0

    def _gauge(self, name: str, what: str) -> Gauge:
        return Gauge(name, what, multiprocess_mode="livesum", registry=self._registry)

    def feed(self, reranker: Reranker) -> None:
        """Add what a reranker has done since it was last asked."""
        snapshot = reranker.stats
        stats, seen = snapshot.to_dict(), self._seen.to_dict()
        self._seen = snapshot
        new = {name: max(0, value - seen[name]) for name, value in stats.items()}
        for field, counter in self._counters.items():
            counter.inc(new[field])
        self._found.labels("metadata").inc(new["metadata_hits"])
        self._found.labels("store").inc(new["store_hits"])
        self._found.labels("memory").inc(max(0, new["cache_hits"] - new["metadata_hits"] - new["store_hits"]))
        self._stages.labels("encode").inc(new["encode_seconds"])
        self._stages.labels("score").inc(new["score_seconds"])
        kalm = as_kalm(reranker)
        if kalm is not None:
            engine = kalm.runtime.engine
            self._queue.set(engine.n_queued)
            n_batches, self._n_batches = self._n_batches, engine.n_batches
            self._batches.inc(max(0, self._n_batches - n_batches))

    def measure_store(self, reranker: Reranker) -> None:
        """Ask the store how large it is; it may be slow, or gone."""
        kalm = as_kalm(reranker)
        if kalm is not None:
            with contextlib.suppress(StoreError):
                self._store_bytes.set(kalm.store_bytes or 0)

    def render(self) -> bytes:
        """Return all numbers, of all workers, as text."""
        if not self._is_shared:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
