"""Encodings into documents that a store has already, and out of them, through each store's own API and without embedding."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from langchain_core.documents import Document
from langchain_core.vectorstores import VectorStore

from kalm_integrations.core.types import ENCODING_KEY
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting import filling
from kalm_integrations.hosting import stores as hosting
from kalm_integrations.hosting.documents import check_encoding_key
from kalm_integrations.hosting.filling import DEFAULT_BATCH_SIZE, BackfillReport, LoadReport, Pace
from kalm_integrations.hosting.stores import DocumentId, Written
from kalm_integrations.langchain.documents import document_kind
from kalm_integrations.langchain.encode import KalmPassageEncoder
from kalm_integrations.langchain.store_kinds import KINDS, kind_of
from kalm_integrations.langchain.store_kinds.base import StoreAccess


@runtime_checkable
class DocumentAccess(hosting.DocumentAccess[Document], Protocol):
    """What write-back and backfill need of a store; implement it for a store that is not known here."""

    def id_of(self, document: Document) -> DocumentId | None:
        """Return the id under which the store holds a document that it returned."""


def write_back_to(
    store: object,
    *,
    encoding_key: str = ENCODING_KEY,
    id_of: Callable[[Document], DocumentId | None] | None = None,
) -> Callable[[Sequence[Document]], None]:
    """Return what `KalmRerank(write_back=...)` takes, for a store.

    Documents that are gone, have another text by now or have no id are passed over; how many, is logged.

    Args:
        store: Chroma, QdrantVectorStore, PGVector and PGVectorStore (sync), Milvus, LanceDB (langchain-community's), FAISS,
            InMemoryVectorStore, a key-value docstore, or a `DocumentAccess`. It is changed in memory where it lives in
            memory: save FAISS yourself.
        encoding_key: metadata key of the encoding.
        id_of: finds the store's id of a document where the document's own is not it, as with a key-value docstore whose
            keys are in the metadata.

    Raises:
        SettingsError: the store is none of these, or has no place for encodings.
    """
    kind = document_kind(check_encoding_key(encoding_key))
    access = access_to(store, encoding_key)
    find_id = access.id_of if id_of is None else id_of

    def write_back(documents: Sequence[Document]) -> None:
        ids = [find_id(document) for document in documents]
        found = {i: document for i, document in zip(ids, documents, strict=True) if i is not None}
        hosting.write_encodings(access, kind, found, n_without_id=ids.count(None))

    return write_back


def fetch_from(
    store: object,
    *,
    encoding_key: str = ENCODING_KEY,
    id_of: Callable[[Document], DocumentId | None] | None = None,
) -> Callable[[Sequence[Document]], list[Any]]:
    """Return what `KalmRerank(fetch=...)` takes, for a store: by one call it reads the documents that came without encodings.

    Args:
        store: any vector store with `get_by_ids`, or what `write_back_to` takes. It need not be the one that was searched.
        encoding_key: metadata key of the encoding.
        id_of: finds the store's id of a document; see `write_back_to`.

    Raises:
        SettingsError: the store is none of these.
    """
    kind = document_kind(check_encoding_key(encoding_key))
    is_other = isinstance(store, VectorStore) and kind_of(store) is None and not isinstance(store, DocumentAccess)
    access: Any = _ById(store) if is_other else access_to(store, encoding_key)
    find_id = access.id_of if id_of is None else id_of

    def fetch(documents: Sequence[Document]) -> list[Any]:
        return hosting.encodings_of(access, kind, [find_id(document) for document in documents])

    return fetch


def backfill(
    store: object,
    encoder: KalmPassageEncoder | None = None,
    *,
    check_texts: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
    documents_per_second: float | None = None,
    show_progress: bool = True,
) -> BackfillReport:
    """Encode a store's documents that a query would have to encode, in place and without embedding them again.

    Each batch is written when it is done, so a run that was stopped is continued by the next one.

    Args:
        store: what `write_back_to` takes.
        encoder: brings model and settings; `KalmPassageEncoder()` for None.
        check_texts: read every document. False believes `kalm_fp`: fewer documents are read, but an encoding that is damaged,
            of another text, or of a text that was cut before `long_passages` was set, is not found.
        batch_size: documents read, encoded and written at a time.
        documents_per_second: at most, so that queries have the store and the model; None goes as fast as it can.
        show_progress: draw a progress bar.

    Raises:
        SettingsError: the store is not known or has no place for encodings, or `batch_size` or `documents_per_second` is not
            positive.
        EncodingTooLargeError: an encoding does not fit `max_inline_bytes`.
        StoreError: the store could not be read.
    """
    encoder = KalmPassageEncoder() if encoder is None else encoder
    access = access_to(store, encoder.encoding_key)
    kind, reranker = document_kind(encoder.encoding_key), encoder.reranker
    pace = Pace(batch_size, documents_per_second, show_progress)
    return filling.backfill(access, kind, reranker, check_texts=check_texts, pace=pace)


def load_encodings(
    store: object,
    rows: Iterable[Mapping[str, Any]],
    *,
    id_field: str = "id",
    encoding_key: str = ENCODING_KEY,
    batch_size: int = DEFAULT_BATCH_SIZE,
    documents_per_second: float | None = None,
    show_progress: bool = True,
) -> LoadReport:
    """Write encodings that were made elsewhere into a store's documents, by id; no model is needed and nothing is embedded.

    Only an encoding of the very text that the store holds is written. Rows may come again: a run that was stopped is
    continued by the next one.

    Args:
        store: what `write_back_to` takes.
        rows: with an id, `kalm_encoding` and `kalm_fp`, such as `kalm encode` writes and `bulk.read_encoded` reads.
        id_field: field of the rows that has the store's id; a number is taken for its digits where ids are strings.
        encoding_key: metadata key under which the encodings are to lie.
        batch_size: documents read and written at a time.
        documents_per_second: at most, so that queries have the store; None goes as fast as it can.
        show_progress: draw a progress bar.

    Raises:
        SettingsError: the store is not known or has no place for encodings, or `batch_size` or `documents_per_second` is not
            positive.
        StoreError: the store could not be read.
    """
    kind = document_kind(check_encoding_key(encoding_key))
    access = access_to(store, encoding_key)
    if isinstance(access, StoreAccess) and access.has_text_ids:
        rows = _TextIds(rows, id_field)
    pace = Pace(batch_size, documents_per_second, show_progress)
    return filling.load_encodings(access, kind, rows, id_field=id_field, pace=pace)


def drop_encodings(
    store: object,
    *,
    encoding_key: str = ENCODING_KEY,
    batch_size: int = DEFAULT_BATCH_SIZE,
    documents_per_second: float | None = None,
    show_progress: bool = True,
) -> Written:
    """Take the encodings under one key, and their fingerprints, out of a store's documents.

    Args:
        store: what `write_back_to` takes.
        encoding_key: metadata key of the encodings.
        batch_size: documents read and written at a time.
        documents_per_second: at most, so that queries have the store; None goes as fast as it can.
        show_progress: draw a progress bar.

    Raises:
        SettingsError: the store is not known or has no place for encodings, or `batch_size` or `documents_per_second` is not
            positive.
        StoreError: the store could not be read.
    """
    kind = document_kind(check_encoding_key(encoding_key))
    access = access_to(store, encoding_key)
    return filling.drop_encodings(access, kind, pace=Pace(batch_size, documents_per_second, show_progress))


def access_to(store: object, encoding_key: str = ENCODING_KEY) -> DocumentAccess:
    """Return the access to a store, for encodings under a key.

    Raises:
        SettingsError: there is none, or the store has no place for encodings.
    """
    if isinstance(store, DocumentAccess):
        return store
    kind = kind_of(store)
    if kind is not None:
        return kind(store, encoding_key)
    msg = (
        f"store must be a key-value docstore, a DocumentAccess or one of {', '.join(KINDS)}, but got {type(store).__name__}; "
        "write a DocumentAccess for it"
    )
    raise SettingsError(msg)


class _TextIds(Iterable[Mapping[str, Any]]):
    """Rows, numbers among whose ids become strings."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], id_field: str) -> None:
        self._rows = rows
        self._id_field = id_field

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for row in self._rows:
            found = row.get(self._id_field)
            yield {**row, self._id_field: str(found)} if isinstance(found, int) else row

    def __length_hint__(self) -> int:
        return operator.length_hint(self._rows)


class _ById:
    """Any vector store, for reading only."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Document]:
        return {document.id: document for document in self._store.get_by_ids([str(i) for i in ids])}

    def id_of(self, document: Document) -> DocumentId | None:
        return document.id
