"""A document's text as the model reads it, and the place of its encoding in `meta`. Ranker and encoder must agree on both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from haystack import Document

from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY, Passage
from kalm_integrations.errors import SettingsError


@dataclass(frozen=True)
class DocumentLayout:
    """Which parts of a document make the passage, and under which key its encoding lies."""

    meta_fields_to_embed: Sequence[str]
    """Meta fields whose values are put in front of the content. Those that hold encodings are ignored."""
    embedding_separator: str
    """Stands between them and the content."""
    encoding_key: str
    """Meta key of the encoding."""

    def __post_init__(self) -> None:
        """Check the key.

        Raises:
            SettingsError: it is empty, or the key of the fingerprint.
        """
        if not self.encoding_key or self.encoding_key == FINGERPRINT_KEY:
            msg = f"encoding_key must be a non-empty meta key other than {FINGERPRINT_KEY!r}, but got {self.encoding_key!r}"
            raise SettingsError(msg)

    def passage(self, document: Document) -> Passage:
        """Return a document's text and stored encoding."""
        fields = [field for field in self.meta_fields_to_embed if field not in (self.encoding_key, FINGERPRINT_KEY)]
        values = [str(document.meta[field]) for field in fields if document.meta.get(field) is not None]
        text = self.embedding_separator.join([*values, document.content or ""])
        return Passage(text, document.meta.get(self.encoding_key))

    def attach(self, document: Document, metadata: Mapping[str, str]) -> Document:
        """Return a copy of a document, with the same id, that carries what `Reranker.encode_to_metadata` made of it."""
        encoding = {self.encoding_key: metadata[ENCODING_KEY], FINGERPRINT_KEY: metadata[FINGERPRINT_KEY]}
        return replace(document, meta={**document.meta, **encoding})

    def strip(self, meta: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of `meta` without encoding and fingerprint."""
        # Copied first: a store may update the dict from another thread (InMemoryDocumentStore hands out its own).
        kept = dict(meta)
        kept.pop(self.encoding_key, None)
        kept.pop(FINGERPRINT_KEY, None)
        return kept


def check_documents(documents: object, component_name: str) -> None:
    """Check that what a component was given is a list of documents.

    Raises:
        TypeError: it is not.
    """
    if isinstance(documents, list):
        wrong = next((type(item).__name__ for item in documents if not isinstance(item, Document)), None)
        if wrong is None:
            return
        received = f"a list with a {wrong}"
    else:
        received = type(documents).__name__
    msg = f"{component_name} expects a list of Documents as input, but got {received}"
    raise TypeError(msg)
