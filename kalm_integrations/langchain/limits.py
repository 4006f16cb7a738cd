"""Limits of stores that refuse a document whole when its metadata are too long."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.vectorstores import VectorStore

from kalm_integrations.errors import EncodingTooLargeError
from kalm_integrations.hosting.limits import (
    LUCENE_TERM_BYTES,
    MILVUS_DYNAMIC_BYTES,
    MILVUS_VARCHAR_BYTES,
    PINECONE_METADATA_BYTES,
)

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
    """Check encoded documents against what a store is known to refuse.

    Raises:
        EncodingTooLargeError: one is too long; the error has its `index`.
    """
    names = [base.__name__ for base in type(store).__mro__]
    name = next((name for name in names if name in _MAX_VALUE or name in _MAX_METADATA), None)
    if name is None:
        return
    max_metadata, has_text = _MAX_METADATA.get(name), True
    if getattr(store, "enable_dynamic_field", False):
        if _is_milvus_lite(store):
            return
        max_metadata, has_text = MILVUS_DYNAMIC_BYTES, False
    for index, document in enumerate(documents):
        length = len(document.metadata[encoding_key])
        if max_metadata is not None:
            # What belongs to the document itself leaves that much less for the encoding.
            text = document.page_content if has_text else ""
            taken = len(json.dumps([document.metadata, text], default=str).encode()) - length
            limit = max(max_metadata - taken, 0)
            others = "text and other metadata" if has_text else "other metadata"
            rule = f"{max_metadata} bytes of metadata, of which the document's {others} take {taken}"
        else:
            limit = _MAX_VALUE[name]
            rule = f"{limit} characters in a metadata value"
        if length > limit:
            msg = (
                f"{name} takes at most {rule}, but this encoding has {length}; set "
                f"max_inline_bytes={limit} or less, a smaller storage_codec, or storage_mode='reference' with a payload_store"
            )
            raise EncodingTooLargeError(msg, index=index)


def _is_milvus_lite(store: Any) -> bool:
    """Return whether a Milvus store is a file on this machine."""
    address = str(getattr(store, "_connection_args", {}).get("uri", ""))
    return address.endswith(".db")
