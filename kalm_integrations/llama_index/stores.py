"""Writing encodings into stores that hold nodes already: write-back at query time, and backfill."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from llama_index.core.schema import BaseNode
from llama_index.core.storage.docstore.types import BaseDocumentStore
from llama_index.core.vector_stores.utils import node_to_metadata_dict
from tqdm.auto import tqdm

from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting.stores import BackfillReport
from kalm_integrations.llama_index.encoder import KalmPassageEncoder
from kalm_integrations.llama_index.nodes import attach
from kalm_integrations.llama_index.rerank import WriteBack

logger = logging.getLogger(__name__)


def write_back_to(store: Any, encoding_key: str = ENCODING_KEY) -> WriteBack:
    """Return a `write_back` for `KalmRerank` that writes encodings into a store, without embedding anything again.

    Only the encoding goes into the store: what other postprocessors made of a node's text and metadata does not. Nodes that
    the store does not have are left out.

    Args:
        store: the document store that the index reads its nodes from (`index.docstore`: simple, Redis, Postgres or any other),
            a `ChromaVectorStore`, or a `QdrantVectorStore`.
        encoding_key: that of the reranker.

    Raises:
        SettingsError: it is another kind of store.
    """
    opened = _open(store)

    def write_back(nodes: Sequence[BaseNode]) -> None:
        if not nodes:
            return
        metadata = {n.node_id: {key: n.metadata[key] for key in (encoding_key, FINGERPRINT_KEY)} for n in nodes}
        stored = opened.read(list(metadata))
        if len(stored) < len(metadata):
            logger.warning("%d of %d nodes to write back are not in the store", len(metadata) - len(stored), len(metadata))
        if stored:
            opened.write([attach(node, metadata[node.node_id], encoding_key) for node in stored])

    return write_back


def backfill(
    store: Any,
    encoder: KalmPassageEncoder,
    *,
    batch_size: int = 64,
    check_texts: bool = False,
    show_progress: bool = True,
) -> BackfillReport:
    """Encode the nodes of a store that have no encoding of the encoder's fingerprint, and write the encodings into it.

    Args:
        store: as in `write_back_to`.
        encoder: the encoder of the ingestion pipeline.
        batch_size: nodes that are read, encoded and written at once.
        check_texts: check every encoding, which also finds damaged ones and those of a text that has changed since;
            otherwise the fingerprint beside it (`kalm_fp`) is believed.
        show_progress: draw a progress bar.

    Raises:
        SettingsError: it is another kind of store, or `batch_size` is not positive.
        EncodingTooLargeError: a passage does not fit the encoder's `max_inline_bytes`.
    """
    if batch_size < 1:
        msg = f"batch_size must be a positive whole number, but got {batch_size!r}"
        raise SettingsError(msg)
    opened = _open(store)
    ids = opened.ids(None if check_texts else encoder.reranker.fingerprint)
    missing = stale = 0
    with tqdm(total=len(ids), desc="encoding", unit="node", disable=not show_progress) as progress:
        for start in range(0, len(ids), batch_size):
            nodes = opened.read(ids[start : start + batch_size])
            changed = [(old, new) for old, new in zip(nodes, encoder(nodes), strict=True) if old.metadata != new.metadata]
            if changed:
                opened.write([new for _, new in changed])
            values = [(old.metadata.get(encoder.encoding_key), new.metadata[encoder.encoding_key]) for old, new in changed]
            missing += sum(old is None for old, _ in values)
            stale += sum(old is not None and old != new for old, new in values)
            progress.update(len(nodes))
    return BackfillReport(len(ids), missing, stale)


class _Store(ABC):
    """What write-back and backfill need of a store."""

    def __init__(self, store: Any) -> None:
        self._store = store

    @abstractmethod
    def ids(self, fingerprint: str | None) -> list[str]:
        """Return the ids of the nodes that do not have this fingerprint, or of all."""

    def read(self, ids: list[str]) -> list[BaseNode]:
        """Return those of the nodes that the store has; `ids` must not be empty, which some stores take for all."""
        nodes: list[BaseNode] = self._store.get_nodes(ids)
        return nodes

    @abstractmethod
    def write(self, nodes: Sequence[BaseNode]) -> None:
        """Replace the metadata of stored nodes."""


class _DocumentStore(_Store):
    def ids(self, fingerprint: str | None) -> list[str]:
        nodes = self._store.docs
        # An ingestion pipeline keeps its source documents here too; nobody retrieves those.
        sources = {node.ref_doc_id for node in nodes.values()}
        return [
            node_id
            for node_id, node in nodes.items()
            if node_id not in sources and (fingerprint is None or node.metadata.get(FINGERPRINT_KEY) != fingerprint)
        ]

    def read(self, ids: list[str]) -> list[BaseNode]:
        nodes: list[BaseNode] = self._store.get_nodes(ids, raise_error=False)
        return nodes

    def write(self, nodes: Sequence[BaseNode]) -> None:
        # A document that was not split is known to pipelines by the hash it came with; the encoding must not change that.
        unsplit = [node.node_id for node in nodes if node.ref_doc_id is None]
        hashes = {node_id: self._store.get_document_hash(node_id) for node_id in unsplit}
        self._store.add_documents(nodes, allow_update=True)
        self._store.set_document_hashes({node_id: known for node_id, known in hashes.items() if known is not None})


class _ChromaStore(_Store):
    def ids(self, fingerprint: str | None) -> list[str]:
        where = None if fingerprint is None else {FINGERPRINT_KEY: {"$ne": fingerprint}}
        ids: list[str] = self._store.client.get(where=where, include=[])["ids"]
        return ids

    def write(self, nodes: Sequence[BaseNode]) -> None:
        # Nodes are read from `_node_content`, a copy of the metadata that the framework stores beside it: both are written.
        metadata = [node_to_metadata_dict(node, remove_text=True, flat_metadata=self._store.flat_metadata) for node in nodes]
        filled = [{key: "" if value is None else value for key, value in entry.items()} for entry in metadata]
        self._store.client.update([node.node_id for node in nodes], metadatas=filled)


class _QdrantStore(_Store):
    def ids(self, fingerprint: str | None) -> list[str]:
        from qdrant_client import models

        chosen = None
        if fingerprint is not None:
            match = models.MatchValue(value=fingerprint)
            chosen = models.Filter(must_not=[models.FieldCondition(key=FINGERPRINT_KEY, match=match)])
        ids: list[str] = []
        offset = None
        while True:
            points, offset = self._store.client.scroll(
                self._store.collection_name, scroll_filter=chosen, limit=1000, offset=offset, with_payload=False
            )
            ids += [str(point.id) for point in points]
            if offset is None:
                return ids

    def write(self, nodes: Sequence[BaseNode]) -> None:
        from qdrant_client import models

        operations = [
            models.SetPayloadOperation(
                set_payload=models.SetPayload(
                    payload=node_to_metadata_dict(node, remove_text=False, flat_metadata=self._store.flat_metadata),
                    points=[node.node_id],
                )
            )
            for node in nodes
        ]
        self._store.client.batch_update_points(self._store.collection_name, operations)


_VECTOR_STORES: dict[str, type[_Store]] = {"ChromaVectorStore": _ChromaStore, "QdrantVectorStore": _QdrantStore}


def _open(store: Any) -> _Store:
    if isinstance(store, BaseDocumentStore):
        return _DocumentStore(store)
    # By name: this package does not need theirs.
    for kind in type(store).__mro__:
        if kind.__name__ in _VECTOR_STORES:
            return _VECTOR_STORES[kind.__name__](store)
    msg = (
        f"store must be a document store, {' or '.join(_VECTOR_STORES)}, but got {type(store).__name__}; for another one pass "
        "a function of your own as write_back"
    )
    raise SettingsError(msg)
