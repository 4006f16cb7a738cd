"""A service for the load test, in a process of its own: `python -m benchmarks.serving_app WAY MODEL DEVICE STORE`."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

import uvicorn

from benchmarks.serving_page import BOUNDED, OFF, PEER, STORED
from kalm_integrations.core.base import RankRequest, Reranker
from kalm_integrations.core.ranking import sigmoid
from kalm_integrations.core.types import AnyPassage, Metadata, Ranking, Reading, RuntimeStats, checked_list
from kalm_integrations.serving.app import create_app
from kalm_integrations.serving.running import bind, url_of
from kalm_integrations.serving.service import open_kalm
from kalm_integrations.serving.settings import ServiceSettings

TIMEOUT = 1800.0
"""Seconds that a request may take: the slow ways shall be measured, not refused."""

MAX_STORE_BYTES = 64 * 2**20
SMALL_CACHES = {"cache_bytes": 32 * 2**20, "prefix_cache_bytes": 128 * 2**20}


class CrossEncoderReranker(Reranker):
    """A cross-encoder of sentence-transformers, which reads every pair anew; one call at a time."""

    def __init__(self, folder: str, device: str) -> None:
        from sentence_transformers import CrossEncoder

        self._model = CrossEncoder(folder, device=device)
        self._lock = threading.Lock()

    @property
    def fingerprint(self) -> str:
        return "0" * 32

    @property
    def stats(self) -> RuntimeStats:
        return RuntimeStats()

    def warm_up(self, *, encoder: bool = True, decoder: bool = True) -> None:
        self._model.predict([("a", "b")], show_progress_bar=False)

    def encode_to_metadata(self, texts: Iterable[str], show_progress: bool = False) -> list[Metadata]:
        raise NotImplementedError  # it has nothing to store

    def read(self, passages: Iterable[AnyPassage]) -> Reading:
        texts = [getattr(passage, "text", passage) for passage in checked_list(passages, "passages")]
        return Reading(("missing",) * len(texts), tuple(texts), tuple(texts), {}, "", {})

    def answer(self, request: RankRequest) -> list[Ranking]:
        rankings = []
        for query, given in zip(request.queries, request.lists, strict=True):
            reading = given if isinstance(given, Reading) else self.read(given)
            with self._lock:
                scores = self._model.predict([(query, text) for text in reading.texts], show_progress_bar=False)
            margins = [float(score) for score in scores]
            ranked = request.rules.apply(margins, [sigmoid(margin) for margin in margins], reading.texts, None)
            rankings.append(Ranking(ranked, reading))
        return rankings


def settings_of(way: str, model: str, device: str, store: str) -> ServiceSettings:
    """Return the settings of a way."""
    given: dict[str, Any] = {"model": model, "timeout": TIMEOUT, "max_queue": 10**6, "log_level": "error"}
    if way in (STORED, BOUNDED):
        given |= {"store": store, "max_store_bytes": MAX_STORE_BYTES}
    caches = {OFF: {"cache_bytes": 0, "prefix_cache_bytes": 0}, BOUNDED: SMALL_CACHES}.get(way, {})
    return ServiceSettings.make(**given, model_settings={"device": device, **caches})


def main(way: str, model: str, device: str, store: str) -> None:
    """Serve until the process is ended."""
    openers: dict[str, Callable[[ServiceSettings], Reranker]] = {PEER: lambda _: CrossEncoderReranker(model, device)}
    settings = settings_of(way, model, device, store)
    listening = bind("127.0.0.1", 0)
    print(url_of(listening), flush=True)
    app = create_app(settings, openers.get(way, open_kalm))
    uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False)).run(sockets=[listening])


if __name__ == "__main__":
    main(*sys.argv[1:])
