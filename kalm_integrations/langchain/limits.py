"""Limits of stores that refuse a document whole when one metadata value is too long."""

from __future__ import annotations

from collections.abc import Iterable

from langchain_core.vectorstores import VectorStore

from kalm_integrations.errors import EncodingTooLargeError

# By class name, so that no store's package is imported.
_MAX_CHARACTERS = {
    "Milvus": 65_535,  # VARCHAR of a static schema
    "OpenSearchVectorSearch": 32_766,  # a Lucene term, which the default mapping makes of a string
    "ElasticsearchStore": 32_766,
    "PineconeVectorStore": 40_960,  # of all metadata of a document together
}


def check_store_takes(store: VectorStore, encodings: Iterable[str]) -> None:
    """Check encodings against what a store is known to refuse; Milvus with dynamic fields has no limit.

    Raises:
        EncodingTooLargeError: one is longer.
    """
    name = next((base.__name__ for base in type(store).__mro__ if base.__name__ in _MAX_CHARACTERS), None)
    if name is None or getattr(store, "enable_dynamic_field", False):
        return
    limit = _MAX_CHARACTERS[name]
    longest = max(map(len, encodings))
    if longest > limit:
        msg = (
            f"{name} takes at most {limit} characters in a metadata value, but an encoding has {longest}; set "
            f"max_inline_bytes={limit} or less, a smaller storage_codec, or storage_mode='reference' with a payload_store"
        )
        raise EncodingTooLargeError(msg)
