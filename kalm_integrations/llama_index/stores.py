"""Encodings into nodes that a store has already, without embedding a text again, and out of them at query time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama_index.core.schema import BaseNode, MetadataMode
from llama_index.core.storage.docstore.keyval_docstore import KVDocumentStore
from llama_index.core.vector_stores.types import BasePydanticVectorStore

from kalm_integrations.core.types import ENCODING_KEY
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting import filling
from kalm_integrations.hosting import stores as hosting
from kalm_integrations.hosting.documents import check_encoding_key
from kalm_integrations.hosting.filling import DEFAULT_BATCH_SIZE, BackfillReport, LoadReport, Pace
from kalm_integrations.hosting.stores import DocumentAccess, Written
from kalm_integrations.llama_index.docstores import docstore_access
from kalm_integrations.llama_index.encode import KalmPassageEncoder
from kalm_integrations.llama_index.nodes import node_kind
from kalm_integrations.llama_index.rerank import Fetch, WriteBack
from kalm_integrations.llama_index.vectors import KNOWN_VECTOR_STORES, AnyVectorStore, vector_store_access


def write_back_to(store: Any, encoding_key: str = ENCODING_KEY) -> WriteBack:
    """Return a `write_back` for `KalmRerank` that writes encodings into a store, without embedding anything again.

    Only the encoding goes into the store: what other postprocessors made of a node's text and metadata does not. Nodes that
    are gone or have another text by now are passed over; how many, is logged.

    Args:
        store: the document store that the index reads its nodes from (`index.docstore`: simple, Redis, Postgres or another
            one over a key-value store), a vector store (`ChromaVectorStore`, `QdrantVectorStore`, `PGVectorStore`,
            `LanceDBVectorStore`), or a `DocumentAccess`.
        encoding_key: that of the reranker.

    Raises:
        SettingsError: it is another kind of store, or `encoding_key` is one of our other keys.
    """
    access, kind = access_to(store), node_kind(check_encoding_key(encoding_key))

    def write_back(nodes: Sequence[BaseNode]) -> None:
        hosting.write_encodings(access, kind, {node.node_id: node for node in nodes})

    return write_back


def fetch_from(store: Any, encoding_key: str = ENCODING_KEY) -> Fetch:
    """Return a `fetch` for `KalmRerank`: by one call it reads the nodes that came without encodings.

    Args:
        store: any vector store with `get_nodes`, or what `write_back_to` takes. It need not be the one that was searched.
        encoding_key: that of the reranker.

    Raises:
        SettingsError: it is another kind of store, or `encoding_key` is one of our other keys.
    """
    is_other = isinstance(store, BasePydanticVectorStore) and vector_store_access(store) is None
    access: Any = AnyVectorStore(store) if is_other else access_to(store)
    kind = node_kind(check_encoding_key(encoding_key))

    def fetch(nodes: Sequence[BaseNode]) -> list[Any]:
        return hosting.encodings_of(access, kind, [node.node_id for node in nodes])

    return fetch


def backfill(
    store: Any,
    encoder: KalmPassageEncoder | None = None,
    *,
    check_texts: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
    documents_per_second: float | None = None,
    show_progress: bool = True,
) -> BackfillReport:
    """Encode the nodes of a store that a query would have to encode, in place and without embedding them again.

    Each batch is written when it is done, so a run that was stopped is continued by the next one.

    Args:
        store: as in `write_back_to`.
        encoder: the encoder of the ingestion pipeline; `KalmPassageEncoder()` for None.
        check_texts: read every node. False believes `kalm_fp`: fewer nodes are read, but an encoding that is damaged, of
            another text, or of a text that was cut before `long_passages` was set, is not found.
        batch_size: nodes read, encoded and written at a time.
        documents_per_second: at most, so that queries have the store and the model; None goes as fast as it can.
        show_progress: draw a progress bar.

    Raises:
        SettingsError: it is another kind of store, or `batch_size` or `documents_per_second` is not positive.
        EncodingTooLargeError: an encoding does not fit the encoder's `max_inline_bytes`.
        StoreError: the store could not be read.
    """
    access = access_to(store)
    encoder = KalmPassageEncoder() if encoder is None else encoder
    kind, reranker = node_kind(encoder.encoding_key, encoder.metadata_mode), encoder.reranker
    pace = Pace(batch_size, documents_per_second, show_progress)
    return filling.backfill(access, kind, reranker, check_texts=check_texts, pace=pace)


def load_encodings(
    store: Any,
    rows: Iterable[Mapping[str, Any]],
    *,
    id_field: str = "id",
    encoding_key: str = ENCODING_KEY,
    metadata_mode: MetadataMode = MetadataMode.EMBED,
    batch_size: int = DEFAULT_BATCH_SIZE,
    documents_per_second: float | None = None,
    show_progress: bool = True,
) -> LoadReport:
    """Write encodings that were made elsewhere into the nodes of a store, by id; no model is opened, nothing is embedded.

    Only an encoding of the very text that the store's node has is written. Rows may come again: a run that was stopped is
    continued by the next one.

    Args:
        store: as in `write_back_to`.
        rows: with a node's id, `kalm_encoding` and `kalm_fp`, such as `kalm encode` writes.
        id_field: the rows' field with the node's id.
        encoding_key: that of the reranker.
        metadata_mode: that of the reranker; which metadata belongs to the text that was encoded.
        batch_size: nodes read and written at a time.
        documents_per_second: at most, so that queries have the store; None goes as fast as it can.
        show_progress: draw a progress bar.

    Raises:
        SettingsError: it is another kind of store, `encoding_key` is one of our other keys, or `batch_size` or
            `documents_per_second` is not positive.
        StoreError: the store could not be read.
    """
    kind = node_kind(check_encoding_key(encoding_key), metadata_mode)
    pace = Pace(batch_size, documents_per_second, show_progress)
    return filling.load_encodings(access_to(store), kind, rows, id_field=id_field, pace=pace)


def drop_encodings(
    store: Any,
    *,
    encoding_key: str = ENCODING_KEY,
    batch_size: int = DEFAULT_BATCH_SIZE,
    documents_per_second: float | None = None,
    show_progress: bool = True,
) -> Written:
    """Take the encodings under one key, and their fingerprints, out of all nodes of a store.

    Args:
        store: as in `write_back_to`.
        encoding_key: metadata key of the encodings.
        batch_size: nodes read and written at a time.
        documents_per_second: at most, so that queries have the store; None goes as fast as it can.
        show_progress: draw a progress bar.

    Raises:
        SettingsError: it is another kind of store, `encoding_key` is one of our other keys, or `batch_size` or
            `documents_per_second` is not positive.
        StoreError: the store could not be read.
    """
    kind, pace = node_kind(check_encoding_key(encoding_key)), Pace(batch_size, documents_per_second, show_progress)
    return filling.drop_encodings(access_to(store), kind, pace=pace)


def access_to(store: Any) -> DocumentAccess[BaseNode]:
    """Return the access to a store.

    Raises:
        SettingsError: there is none.
    """
    if isinstance(store, DocumentAccess):
        return store
    if isinstance(store, KVDocumentStore):
        return docstore_access(store)
    if access := vector_store_access(store):
        return access
    msg = (
        f"store must be a document store over a key-value store, {', '.join(KNOWN_VECTOR_STORES)} or a DocumentAccess, "
        f"but got {type(store).__name__}; write a DocumentAccess for it, or pass a function of your own as write_back"
    )
    raise SettingsError(msg)
