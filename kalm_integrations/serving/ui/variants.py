"""Rerankers of the service's model at other compression ratios and codecs, which the page compares."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from kalm_integrations.core.base import Reranker
from kalm_integrations.core.settings import CODEC_NAMES, COMPRESSION_RATIOS
from kalm_integrations.serving.metrics import as_kalm
from kalm_integrations.serving.service import OpenReranker, Service
from kalm_integrations.serving.settings import ServiceSettings

MAX_VARIANTS = 6
"""Rerankers that are kept beside the service's own; the one that was not asked for longest goes."""

MAX_RATIO = 32
"""Up to which every checkpoint is trained."""

CACHES = {"cache_bytes": 32 * 2**20, "prefix_cache_bytes": 128 * 2**20}
"""Bounds of what each keeps in memory; weights are the same for all."""


class Variants:
    """The service's reranker, and others of the same model."""

    def __init__(self, service: Service, open_reranker: OpenReranker) -> None:
        """Open nothing yet."""
        self._service = service
        self._open = open_reranker
        self._opened: OrderedDict[tuple[int, str], Reranker] = OrderedDict()
        self._lock = asyncio.Lock()

    def choices(self) -> tuple[list[int], list[str]]:
        """Return the ratios and the codecs that may be asked for; none where the reranker has no such settings."""
        own = as_kalm(self._service.reranker)
        if own is None:
            return [], []
        ratios = {ratio for ratio in COMPRESSION_RATIOS if ratio <= MAX_RATIO} | {own.compression_ratio}
        return sorted(ratios), list(CODEC_NAMES)

    def own_setting(self) -> tuple[int, str] | None:
        """Return the ratio and the codec of the service's reranker, if it has some."""
        own = as_kalm(self._service.reranker)
        return None if own is None else (own.compression_ratio, own.storage_codec)

    async def get(self, ratio: int, codec: str) -> Reranker:
        """Return the reranker of a ratio and a codec that are among the choices."""
        setting = (ratio, codec)
        if setting == self.own_setting():
            return self._service.reranker
        async with self._lock:
            if setting not in self._opened:
                # Off the loop: the tokenizer may have to be read once more.
                self._opened[setting] = await asyncio.to_thread(self._open, self._settings(ratio, codec))
            self._opened.move_to_end(setting)
            if len(self._opened) > MAX_VARIANTS:
                self._opened.popitem(last=False)
            return self._opened[setting]

    def _settings(self, ratio: int, codec: str) -> ServiceSettings:
        """Return the service's settings with others for encodings. What is only tried out is not put into the store."""
        settings = self._service.settings
        model_settings = {**settings.model_settings, "compression_ratio": ratio, "storage_codec": codec, **CACHES}
        return settings.model_copy(update={"model_settings": model_settings, "store": None, "max_store_bytes": None})
