"""Haystack: `KalmRanker`, `KalmDocumentEncoder`, and `backfill` for documents that are already in a store.

The components are defined in `haystack_integrations`, the namespace of every Haystack integration, because Haystack loads
pipelines from YAML only with components of modules that it trusts.
"""

from __future__ import annotations

from typing import Any

from haystack_integrations.common.kalm.stores import access_to, fetch_from
from haystack_integrations.components.embedders.kalm import KalmDocumentEncoder
from haystack_integrations.components.rankers.kalm import KalmRanker
from kalm_integrations.hosting import filling
from kalm_integrations.hosting.filling import DEFAULT_BATCH_SIZE, BackfillReport, Pace
from kalm_integrations.hosting.write_back import WriteBackStats, wait_for_write_back, write_back_stats

__all__ = [
    "BackfillReport",
    "KalmDocumentEncoder",
    "KalmRanker",
    "WriteBackStats",
    "backfill",
    "fetch_from",
    "wait_for_write_back",
    "write_back_stats",
]


def backfill(
    document_store: Any,
    encoder: KalmDocumentEncoder | None = None,
    *,
    filters: dict[str, Any] | None = None,
    check_texts: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
    documents_per_second: float | None = None,
    progress_bar: bool = True,
) -> BackfillReport:
    """Encode a store's documents that a query would have to encode, in place and without embedding them again.

    Each batch is written when it is done, so a run that was stopped is continued by the next one.

    Args:
        document_store: a store with `update_by_filter`.
        encoder: brings model and settings; `KalmDocumentEncoder()` for None.
        filters: restricts the work to documents that match, in Haystack's filter language.
        check_texts: read every document. False believes `kalm_fp`: fewer documents are read, but an encoding that is damaged
            or of another text is not found.
        batch_size: documents read, encoded and written at a time.
        documents_per_second: at most, so that queries have the store and the model; None goes as fast as it can.
        progress_bar: draw one.

    Raises:
        SettingsError: the store has no `update_by_filter`, or `batch_size` or `documents_per_second` is not positive.
        EncodingTooLargeError: an encoding does not fit the encoder's `max_inline_bytes`.
        StoreError: the store could not be read.
    """
    access = access_to(document_store, filters)
    encoder = KalmDocumentEncoder() if encoder is None else encoder
    pace = Pace(batch_size, documents_per_second, progress_bar)
    return filling.backfill(access, encoder.layout.kind, encoder.reranker, check_texts=check_texts, pace=pace)
