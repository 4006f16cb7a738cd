"""Haystack: `KalmRanker`, `KalmDocumentEncoder`, and functions for documents that are already in a store.

The components are defined in `haystack_integrations`, the namespace of every Haystack integration, because Haystack loads
pipelines from YAML only with components of modules that it trusts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from haystack_integrations.common.kalm.documents import DocumentLayout
from haystack_integrations.common.kalm.stores import access_to, fetch_from
from haystack_integrations.components.embedders.kalm import KalmDocumentEncoder
from haystack_integrations.components.rankers.kalm import KalmRanker
from kalm_integrations.core.types import ENCODING_KEY
from kalm_integrations.hosting import filling
from kalm_integrations.hosting.documents import check_encoding_key
from kalm_integrations.hosting.filling import DEFAULT_BATCH_SIZE, BackfillReport, LoadReport, Pace
from kalm_integrations.hosting.stores import Written
from kalm_integrations.hosting.write_back import WriteBackStats, wait_for_write_back, write_back_stats

__all__ = [
    "BackfillReport",
    "KalmDocumentEncoder",
    "KalmRanker",
    "LoadReport",
    "WriteBackStats",
    "Written",
    "backfill",
    "drop_encodings",
    "fetch_from",
    "load_encodings",
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
        check_texts: read every document. False believes `kalm_fp`: fewer documents are read, but an encoding that is damaged,
            of another text, or of a text that was cut before `long_passages` was set, is not found.
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


def load_encodings(
    document_store: Any,
    rows: Iterable[Mapping[str, Any]],
    *,
    id_field: str = "id",
    encoding_key: str = ENCODING_KEY,
    meta_fields_to_embed: Sequence[str] = (),
    embedding_separator: str = "\n",
    batch_size: int = DEFAULT_BATCH_SIZE,
    documents_per_second: float | None = None,
    progress_bar: bool = True,
) -> LoadReport:
    """Write encodings that were made elsewhere into a store's documents, by id; no model is opened, nothing is embedded.

    Only an encoding of the very text that the store's document has is written. Rows may come again: a run that was stopped is
    continued by the next one.

    Args:
        document_store: a store with `update_by_filter`.
        rows: with a document's id, `kalm_encoding` and `kalm_fp`, such as `kalm encode` writes.
        id_field: the rows' field with the document's id.
        encoding_key: that of the ranker.
        meta_fields_to_embed: those of the ranker; they are in front of the content in the text that was encoded.
        embedding_separator: that of the ranker.
        batch_size: documents read and written at a time.
        documents_per_second: at most, so that queries have the store; None goes as fast as it can.
        progress_bar: draw one.

    Raises:
        SettingsError: the store has no `update_by_filter`, `encoding_key` is one of our other keys, or `batch_size` or
            `documents_per_second` is not positive.
        StoreError: the store could not be read.
    """
    layout = DocumentLayout(tuple(meta_fields_to_embed), embedding_separator, check_encoding_key(encoding_key))
    pace = Pace(batch_size, documents_per_second, progress_bar)
    return filling.load_encodings(access_to(document_store), layout.kind, rows, id_field=id_field, pace=pace)


def drop_encodings(
    document_store: Any,
    *,
    filters: dict[str, Any] | None = None,
    encoding_key: str = ENCODING_KEY,
    batch_size: int = DEFAULT_BATCH_SIZE,
    documents_per_second: float | None = None,
    progress_bar: bool = True,
) -> Written:
    """Take the encodings under one key, and their fingerprints, out of a store's documents.

    Chroma, Qdrant, pgvector and the store in memory lose both keys; in another store they become null.

    Args:
        document_store: a store with `update_by_filter`.
        filters: restricts the work to documents that match, in Haystack's filter language.
        encoding_key: meta key of the encodings.
        batch_size: documents read and written at a time.
        documents_per_second: at most, so that queries have the store; None goes as fast as it can.
        progress_bar: draw one.

    Raises:
        SettingsError: the store has no `update_by_filter`, `encoding_key` is one of our other keys, or `batch_size` or
            `documents_per_second` is not positive.
        StoreError: the store could not be read.
    """
    kind = DocumentLayout((), "", check_encoding_key(encoding_key)).kind
    pace = Pace(batch_size, documents_per_second, progress_bar)
    return filling.drop_encodings(access_to(document_store, filters), kind, pace=pace)
