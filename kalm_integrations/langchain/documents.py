"""How an encoding lies in a document's metadata."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.documents import Document

from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY, Passage, Reranker


def passage(document: Document, encoding_key: str) -> Passage:
    """Return the text of a document with the encoding that it carries."""
    return Passage(document.page_content, document.metadata.get(encoding_key))


def with_metadata(document: Document, metadata: dict[str, Any]) -> Document:
    """Return a copy with other metadata; id and class stay."""
    return document.model_copy(update={"metadata": metadata})


def without_encoding(document: Document, encoding_key: str) -> dict[str, Any]:
    """Return a document's metadata without what this package put there."""
    return {k: v for k, v in document.metadata.items() if not str(k).startswith((encoding_key, FINGERPRINT_KEY))}


def find_unencoded(documents: Sequence[Document], reranker: Reranker, encoding_key: str) -> list[int]:
    """Return the indices of the documents without a sound encoding of their text; every encoding is read for that."""
    return reranker.find_unencoded([passage(document, encoding_key) for document in documents])


def with_encodings(
    documents: Sequence[Document],
    missing: Sequence[int],
    reranker: Reranker,
    encoding_key: str,
    *,
    show_progress: bool = False,
) -> list[Document]:
    """Return copies of documents that all carry a sound encoding, encoding those at the indices `missing`."""
    made = reranker.encode_to_metadata([documents[index].page_content for index in missing], show_progress)
    values = {index: {encoding_key: metadata[ENCODING_KEY]} for index, metadata in zip(missing, made, strict=True)}
    label = {FINGERPRINT_KEY: reranker.fingerprint}
    return [
        with_metadata(document, {**document.metadata, **values.get(index, {}), **label})
        for index, document in enumerate(documents)
    ]
