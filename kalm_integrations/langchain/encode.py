"""Encoding documents at ingest, and their identity for `index()`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import date, time
from decimal import Decimal
from pathlib import PurePath
from typing import Any
from uuid import UUID

from langchain_core.documents import BaseDocumentTransformer, Document
from langchain_core.vectorstores import VectorStore

from kalm_integrations.core.types import ENCODING_KEY
from kalm_integrations.errors import SettingsError
from kalm_integrations.langchain.documents import find_unencoded, with_encodings
from kalm_integrations.langchain.limits import check_store_takes
from kalm_integrations.langchain.model import WithReranker


class KalmPassageEncoder(WithReranker, BaseDocumentTransformer):
    """Adds its encoding to the metadata of each document. Put it after splitting and before the store.

    Returns copies. Documents that already carry an encoding of this text and model are not encoded again, duplicates are
    encoded once.

    ```python
    vectorstore.add_documents(KalmPassageEncoder(model="nano").transform_documents(splits))
    ```
    """

    encoding_key: str = ENCODING_KEY
    """Metadata key of the encoding."""
    show_progress: bool = False
    """Draw a progress bar."""
    store: VectorStore | None = None
    """Where the documents will go, if values that it would refuse shall be an error here."""

    def transform_documents(self, documents: Sequence[Document], **kwargs: Any) -> list[Document]:
        """Return copies of the documents with `kalm_encoding` and `kalm_fp` in their metadata, in order.

        Args:
            documents: what to encode; only `page_content` is read.
            kwargs: none are known; the interface asks for them.

        Raises:
            SettingsError: `kwargs` were given.
            EncodingTooLargeError: an encoding does not fit `max_inline_bytes`, or is more than `store` takes.
        """
        if kwargs:
            msg = f"transform_documents takes only documents, but got {', '.join(kwargs)}; set fields of the encoder instead"
            raise SettingsError(msg)
        if not documents:
            return []
        return encode_missing(self, documents, find_unencoded(documents, self.reranker, self.encoding_key))


def encode_missing(encoder: KalmPassageEncoder, documents: Sequence[Document], missing: Sequence[int]) -> list[Document]:
    """Do what `KalmPassageEncoder` does with documents of which is known which have no sound encoding."""
    key = encoder.encoding_key
    encoded = with_encodings(documents, missing, encoder.reranker, key, show_progress=encoder.show_progress)
    if encoder.store is not None:
        check_store_takes(encoder.store, (document.metadata[key] for document in encoded))
    return encoded


def kalm_key_encoder(document: Document) -> str:
    """Return an id made of text and metadata without what this package adds, for `index(..., key_encoder=...)`.

    With LangChain's own key encoders a document that gets an encoding, or another one, counts as new: the old one is deleted
    and the text is embedded again. The id is a UUID, because some stores (Qdrant) take no other string.

    Raises:
        SettingsError: the metadata holds something that has no lasting text form.
    """
    metadata = {k: v for k, v in document.metadata.items() if not str(k).startswith("kalm_")}
    facts = json.dumps([document.page_content, metadata], sort_keys=True, default=_as_text)
    return str(UUID(bytes=hashlib.blake2b(facts.encode("utf-8"), digest_size=16).digest()))


def _as_text(value: object) -> str:
    if isinstance(value, (date, time, UUID, PurePath, Decimal)):
        return str(value)
    msg = f"metadata must be made of JSON types, dates, UUIDs, paths and decimals to be hashed, but got {type(value).__name__}"
    raise SettingsError(msg)
