"""Limits of stores that refuse a document whole when its metadata are too long."""

from __future__ import annotations

import json
from collections.abc import Sequence

from langchain_core.documents import Document
from langchain_core.vectorstores import VectorStore

from kalm_integrations.errors import EncodingTooLargeError
from kalm_integrations.hosting.limits import LUCENE_TERM_BYTES, MILVUS_VARCHAR_BYTES, PINECONE_METADATA_BYTES

# By class name, so that no store's package is imported.
_MAX_VALUE = {
    "Milvus": MILVUS_VARCHAR_BYTES,
    "OpenSearchVectorSearch": LUCENE_TERM_BYTES,
    "ElasticsearchStore": LUCENE_TERM_BYTES,
}
"""Bytes of one metadata value."""

_MAX_METADATA = {"PineconeVectorStore": PINECONE_METADATA_BYTES}
"""Bytes of all metadata of a document together, its text among them."""


def check_store_takes(store: VectorStore, documents: Sequence[Document], encoding_key: str) -> None:
    """Check encoded documents against what a store is known to refuse; Milvus with dynamic fields has no limit.

    Raises:
        EncodingTooLargeError: one is too long; the error has its `index`.
    """
    names = [base.__name__ for base in type(store).__mro__]
    name = next((name for name in names if name in _MAX_VALUE or name in _MAX_METADATA), None)
    if name is None or getattr(store, "enable_dynamic_field", False):
        return
    for index, document in enumerate(documents):
        length = len(document.metadata[encoding_key])
        if name in _MAX_METADATA:
            # What belongs to the document itself leaves that much less for the encoding.
            taken = len(json.dumps([document.metadata, document.page_content], default=str).encode()) - length
            limit = max(_MAX_METADATA[name] - taken, 0)
            rule = f"{_MAX_METADATA[name]} bytes of metadata, of which the document's text and other metadata take {taken}"
        else:
            limit = _MAX_VALUE[name]
            rule = f"{limit} characters in a metadata value"
        if length > limit:
            msg = (
                f"{name} takes at most {rule}, but this encoding has {length}; set "
                f"max_inline_bytes={limit} or less, a smaller storage_codec, or storage_mode='reference' with a payload_store"
            )
            raise EncodingTooLargeError(msg, index=index)
