"""Haystack: `KalmRanker`, `KalmDocumentEncoder`, and `backfill` for documents that are already in a store.

The components are defined in `haystack_integrations`, the namespace of every Haystack integration, because Haystack loads
pipelines from YAML only with components of modules that it trusts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from haystack_integrations.common.kalm.stores import check_updatable, write_encodings
from haystack_integrations.components.embedders.kalm import KalmDocumentEncoder
from haystack_integrations.components.rankers.kalm import KalmRanker
from kalm_integrations.core.types import FINGERPRINT_KEY
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting.stores import BackfillReport

if TYPE_CHECKING:
    from haystack import Document

__all__ = ["BackfillReport", "KalmDocumentEncoder", "KalmRanker", "backfill"]


def backfill(
    document_store: Any,
    encoder: KalmDocumentEncoder | None = None,
    *,
    filters: dict[str, Any] | None = None,
    check_texts: bool = False,
    batch_size: int = 256,
    progress_bar: bool = True,
) -> BackfillReport:
    """Encode the documents of a store whose encoding is missing or stale, and write the encodings into it.

    Embeddings are left alone. A run that was cut short is continued by the next one.

    Args:
        document_store: a store with `update_by_filter`.
        encoder: makes the encodings; None takes one with default settings.
        filters: restricts the work to documents that match, in Haystack's filter language.
        check_texts: examine every document, also those whose `kalm_fp` is the encoder's: a store that merges `meta` on
            overwriting (Chroma does) keeps the encoding of a text that has changed since.
        batch_size: documents encoded, then written, at a time.
        progress_bar: draw one.

    Raises:
        SettingsError: the store has no `update_by_filter`, or `batch_size` is not positive.
        EncodingTooLargeError: an encoding does not fit the encoder's `max_inline_bytes`.
    """
    check_updatable(document_store)
    if batch_size < 1:
        msg = f"batch_size must be a positive whole number, but got {batch_size}"
        raise SettingsError(msg)
    encoder = KalmDocumentEncoder() if encoder is None else encoder
    if not check_texts:
        outdated = {"field": f"meta.{FINGERPRINT_KEY}", "operator": "!=", "value": encoder.reranker.fingerprint}
        # Chroma refuses an AND of one.
        filters = {"operator": "AND", "conditions": [filters, outdated]} if filters else outdated
    documents: list[Document] = document_store.filter_documents(filters)
    key = encoder.encoding_key
    n_missing = n_stale = n_failed = 0
    with tqdm(total=len(documents), desc="Encoding", unit="document", disable=not progress_bar) as progress:
        for start in range(0, len(documents), batch_size):
            batch = documents[start : start + batch_size]
            encoded = encoder.encode(batch, show_progress=False)
            changed = [(old, new) for old, new in zip(batch, encoded, strict=True) if new.meta != old.meta]
            n_missing += sum(key not in old.meta for old, _ in changed)
            n_stale += sum(key in old.meta and old.meta[key] != new.meta[key] for old, new in changed)
            n_failed += len(changed) - write_encodings(document_store, [new for _, new in changed], key)
            progress.update(len(batch))
    return BackfillReport(len(documents), n_missing, n_stale, n_failed)
