"""Encoding documents at ingest, and their identity for `index()`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from datetime import date, time
from decimal import Decimal
from pathlib import PurePath
from typing import Any
from uuid import UUID

from langchain_core.documents import BaseDocumentTransformer, Document
from langchain_core.vectorstores import VectorStore

from kalm_integrations.core.types import ENCODING_KEY, Metadata, Passage
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting.documents import check_encoding_key, checked_documents, fingerprint_key, with_encoding
from kalm_integrations.hosting.fields import EncodingFields
from kalm_integrations.hosting.ranking import aencode, encode
from kalm_integrations.langchain.documents import to_passage, with_metadata
from kalm_integrations.langchain.limits import check_store_takes


class KalmPassageEncoder(EncodingFields, BaseDocumentTransformer):
    """Adds its encoding to the metadata of each document. Put it after splitting and before the store.

    Returns copies. Documents that already carry an encoding of this text and model are not encoded again, duplicates are
    encoded once.

    ```python
    vectorstore.add_documents(KalmPassageEncoder(model="nano").transform_documents(splits))
    ```
    """

    show_progress: bool = False
    """Draw a progress bar."""
    store: VectorStore | None = None
    """Where the documents will go, if values that it would refuse shall be an error here."""

    def transform_documents(self, documents: Iterable[Document], **kwargs: Any) -> list[Document]:
        """Return copies of the documents with `kalm_encoding` and `kalm_fp` in their metadata, in order.

        Args:
            documents: what to encode; only `page_content` is read.
            kwargs: none are known; the interface asks for them.

        Raises:
            SettingsError: `kwargs` were given, or something else than documents.
            EncodingTooLargeError: an encoding does not fit `max_inline_bytes`, or is more than `store` takes.
        """
        given = self._checked(documents, kwargs)
        if not given:
            return []
        return self._encoded(given, encode(self.reranker, self._passages(given), show_progress=self.show_progress))

    async def atransform_documents(self, documents: Iterable[Document], **kwargs: Any) -> list[Document]:
        """Do what `transform_documents` does; no thread waits for the model."""
        given = self._checked(documents, kwargs)
        if not given:
            return []
        return self._encoded(given, await aencode(self, self._passages(given), show_progress=self.show_progress))

    def _checked(self, documents: Iterable[Document], kwargs: dict[str, Any]) -> list[Document]:
        if kwargs:
            msg = f"transform_documents takes only documents, but got {', '.join(kwargs)}; set fields of the encoder instead"
            raise SettingsError(msg)
        return checked_documents(documents, Document, "KalmPassageEncoder")

    def _passages(self, documents: Sequence[Document]) -> list[Passage]:
        return [to_passage(document, self.encoding_key) for document in documents]

    def _encoded(self, documents: Sequence[Document], made: Sequence[Metadata]) -> list[Document]:
        key = self.encoding_key
        encoded = [
            with_metadata(document, with_encoding(document.metadata, metadata, key))
            for document, metadata in zip(documents, made, strict=True)
        ]
        if self.store is not None:
            check_store_takes(self.store, encoded, key)
        return encoded


def kalm_key_encoder(document: Document, encoding_key: str = ENCODING_KEY) -> str:
    """Return an id made of text and metadata without what the encoder adds, for `index(..., key_encoder=...)`.

    With LangChain's own key encoders a document that gets an encoding, or another one, counts as new: the old one is deleted
    and the text is embedded again. The id is a UUID, because some stores (Qdrant) take no other string.

    Args:
        document: the document.
        encoding_key: that of the encoder; for another than the default give
            `functools.partial(kalm_key_encoder, encoding_key=...)`.

    Raises:
        SettingsError: the metadata holds something that has no lasting text form.
    """
    added = (check_encoding_key(encoding_key), fingerprint_key(encoding_key))
    metadata = {key: value for key, value in document.metadata.items() if key not in added}
    try:
        facts = json.dumps([document.page_content, metadata], sort_keys=True, default=_as_text)
    except (TypeError, ValueError, RecursionError) as error:
        msg = (
            "metadata must be made of JSON types (their keys of one kind, no value inside itself), dates, UUIDs, paths and "
            f"decimals to be hashed, but {error}; leave that out, or pass a key_encoder of your own"
        )
        raise SettingsError(msg) from error
    return str(UUID(bytes=hashlib.blake2b(facts.encode("utf-8"), digest_size=16).digest()))


def _as_text(value: object) -> str:
    if isinstance(value, (date, time, UUID, PurePath, Decimal)):
        return str(value)
    msg = f"got {type(value).__name__}"
    raise TypeError(msg)
