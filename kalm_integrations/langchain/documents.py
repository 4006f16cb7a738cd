"""LangChain documents: their passage, and copies with other metadata."""

from __future__ import annotations

from typing import Any

from langchain_core.documents import Document

from kalm_integrations.core.types import Passage
from kalm_integrations.hosting.stores import DocumentKind


def to_passage(document: Document, encoding_key: str) -> Passage:
    """Return the text of a document with the encoding that it carries."""
    return Passage(document.page_content, document.metadata.get(encoding_key))


def with_metadata(document: Document, metadata: dict[Any, Any]) -> Document:
    """Return a copy with other metadata; id and class stay."""
    return document.model_copy(update={"metadata": metadata})


def document_kind(encoding_key: str) -> DocumentKind[Document]:
    """Return how write-back and backfill read documents."""
    return DocumentKind(
        to_passage=lambda document: to_passage(document, encoding_key),
        metadata=lambda document: document.metadata,
        has_text_of=lambda held, encoded: held.page_content == encoded.page_content,
        encoding_key=encoding_key,
    )
