"""Encodings into documents that a store already has, without embedding them again."""

from collections.abc import Sequence
from typing import Any

from haystack import Document, logging

from kalm_integrations.core.types import FINGERPRINT_KEY
from kalm_integrations.errors import SettingsError

logger = logging.getLogger(__name__)


def check_updatable(document_store: Any) -> None:
    """Check that a store can update the meta of a document in place.

    Raises:
        SettingsError: it has no `update_by_filter`, which the `DocumentStore` protocol does not demand.
    """
    if not callable(getattr(document_store, "update_by_filter", None)):
        msg = (
            f"document_store must have update_by_filter, but {type(document_store).__name__} has not; "
            "write the documents with its own API, in a callable passed as write_back"
        )
        raise SettingsError(msg)


def write_encodings(document_store: Any, documents: Sequence[Document], encoding_key: str) -> int:
    """Write the encodings that documents carry into the documents of the same ids in a store.

    One call per document, because each has its own value. A failure is logged, and the others go on.

    Args:
        document_store: a store with `update_by_filter`.
        documents: documents with encodings.
        encoding_key: meta key of the encoding.

    Returns:
        How many were written.
    """
    n_written = 0
    for document in documents:
        by_id = {"field": "id", "operator": "==", "value": document.id}
        encoding = {key: document.meta[key] for key in (encoding_key, FINGERPRINT_KEY)}
        try:
            n_updated = document_store.update_by_filter(by_id, encoding)
        except Exception as error:
            # Whatever a store raises: an encoding that is not kept costs time, never a result.
            logger.warning("the encoding of document {id} was not stored: {error}", id=document.id, error=error)
            continue
        if not n_updated:
            logger.warning("the encoding of document {id} was not stored: the store has no such document", id=document.id)
        n_written += bool(n_updated)
    return n_written
