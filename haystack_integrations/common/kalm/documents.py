"""A document's text as the model reads it, and the place of its encoding in `meta`. Ranker and encoder must agree on both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from haystack import Document

from kalm_integrations.core.types import Metadata, Passage, RankedPassage
from kalm_integrations.hosting.documents import encoding_keys, ranked_metadata, with_encoding, without_encodings
from kalm_integrations.hosting.pruning import Excerpt
from kalm_integrations.hosting.stores import DocumentKind


@dataclass(frozen=True)
class DocumentLayout:
    """Which parts of a document make the passage, and under which key its encoding lies."""

    meta_fields_to_embed: tuple[str, ...]
    """Meta fields whose values are put in front of the content. Those that hold encodings are ignored."""
    embedding_separator: str
    """Stands between them and the content."""
    encoding_key: str
    """Meta key of the encoding."""

    def passage(self, document: Document) -> Passage:
        """Return a document's text and stored encoding."""
        ours = encoding_keys(self.encoding_key, document.meta)
        values = [document.meta.get(field) for field in self.meta_fields_to_embed if field not in ours]
        texts = [str(value) for value in values if value is not None]
        text = self.embedding_separator.join([*texts, document.content or ""])
        return Passage(text, document.meta.get(self.encoding_key))

    def bare(self, document: Document) -> Document:
        """Return a copy of a document, with the same id, without encodings and with meta of its own."""
        return replace(document, meta=without_encodings(document.meta, self.encoding_key))

    def attach(self, document: Document, metadata: Metadata) -> Document:
        """Return a copy of a document, with the same id, that carries what `Reranker.encode_to_metadata` made of it."""
        return replace(document, meta=with_encoding(document.meta, metadata, self.encoding_key))

    def scored(self, document: Document, place: RankedPassage, excerpt: Excerpt, *, strip: bool) -> Document:
        """Return a copy of a document with its score, the old one if it was not reranked; without encodings for `strip`.

        A copy whose text was cut has none in any case: an encoding does not fit it.
        """
        meta = ranked_metadata(document.meta, place, self.encoding_key, strip=strip or excerpt.text is not None)
        return replace(
            document,
            content=document.content if excerpt.text is None else excerpt.text,
            score=place.score if place.is_scored else document.score,
            meta=meta | excerpt.metadata,
        )

    @property
    def kind(self) -> DocumentKind[Document]:
        """How write-back and backfill read documents."""
        return DocumentKind(self.passage, _meta, self._has_text_of, self.encoding_key)

    def _has_text_of(self, held: Document, encoded: Document) -> bool:
        return self.passage(held).text == self.passage(encoded).text


def _meta(document: Document) -> Mapping[str, Any]:
    return document.meta
