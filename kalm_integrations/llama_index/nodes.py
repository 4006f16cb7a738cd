"""Nodes and passages. What returns a node returns a copy that shares no metadata; nodes that are given stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llama_index.core.schema import BaseNode, MetadataMode, RelatedNodeInfo

from kalm_integrations.core.types import FUSED_SCORE_KEY, Metadata, Passage
from kalm_integrations.hosting.documents import (
    KEPT_SPANS_KEY,
    RELEVANT_SPANS_KEY,
    RELEVANT_WINDOW_KEY,
    RERANKED_KEY,
    RETRIEVAL_SCORE_KEY,
    encoding_keys,
    only_encodings,
    under_key,
    without_encodings,
    without_marks,
)
from kalm_integrations.hosting.fields import EncodingFields, assigned
from kalm_integrations.hosting.stores import DocumentKind

if TYPE_CHECKING:
    from typing_extensions import Self


_ADDED_KEYS = frozenset(
    {FUSED_SCORE_KEY, KEPT_SPANS_KEY, RELEVANT_SPANS_KEY, RELEVANT_WINDOW_KEY, RERANKED_KEY, RETRIEVAL_SCORE_KEY}
)


class NodeFields(EncodingFields):
    """The fields of a component that reads encodings from nodes or writes them into nodes."""

    metadata_mode: MetadataMode = MetadataMode.EMBED
    """Which metadata belongs to a passage's text."""

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> Self:
        """Return what `to_dict` was called on.

        Raises:
            SettingsError: a setting is unknown or breaks a rule.
        """
        values = {name: value for name, value in {**data, **kwargs}.items() if name != "class_name"}
        # Not by the constructor: settings that were assigned one by one may include one without effect.
        return assigned(cls, values, cls.__name__)


def to_passage(node: BaseNode, encoding_key: str, metadata_mode: MetadataMode) -> Passage:
    """Return what is encoded of a node, with the encoding that it carries.

    The text is that of the node without what rerankers add to it: it is the same before ingest, after retrieval, and behind
    another reranker that keeps the retrieval score, fuses it, or highlights.
    """
    added = encoding_keys(encoding_key, node.metadata) | _ADDED_KEYS
    plain = node.model_copy(update={"metadata": {key: value for key, value in node.metadata.items() if key not in added}})
    return Passage(plain.get_content(metadata_mode=metadata_mode), node.metadata.get(encoding_key))


def stripped(node: BaseNode, encoding_key: str) -> BaseNode:
    """Return a copy without encodings, its own or those of related nodes."""
    ours = encoding_keys(encoding_key, node.metadata)

    def without(related: RelatedNodeInfo) -> RelatedNodeInfo:
        return related.model_copy(update={"metadata": without_encodings(related.metadata, encoding_key)})

    return node.model_copy(
        update={
            "metadata": without_encodings(node.metadata, encoding_key),
            "excluded_embed_metadata_keys": [key for key in node.excluded_embed_metadata_keys if key not in ours],
            "excluded_llm_metadata_keys": [key for key in node.excluded_llm_metadata_keys if key not in ours],
            "relationships": {
                kind: [without(r) for r in related] if isinstance(related, list) else without(related)
                for kind, related in node.relationships.items()
            },
        }
    )


def with_hidden_metadata(node: BaseNode, metadata: Mapping[str, object]) -> BaseNode:
    """Return a copy with more metadata, its keys excluded from the text for embedding models and for LLMs."""
    return node.model_copy(
        update={
            "metadata": {**node.metadata, **metadata},
            "excluded_embed_metadata_keys": list(dict.fromkeys([*node.excluded_embed_metadata_keys, *metadata])),
            "excluded_llm_metadata_keys": list(dict.fromkeys([*node.excluded_llm_metadata_keys, *metadata])),
        }
    )


def unmarked(node: BaseNode) -> BaseNode:
    """Return a copy without what an earlier reranker says of its query."""
    return node.model_copy(update={"metadata": without_marks(node.metadata)})


def with_text(node: BaseNode, text: str) -> BaseNode:
    """Return a copy with another text; all else stays, also where in its source the whole text lies."""
    made = node.model_copy()
    made.set_content(text)
    return made


def with_encoding(node: BaseNode, encoding: Metadata, encoding_key: str) -> BaseNode:
    """Return a copy with what `Reranker.encode_to_metadata` made of it, out of sight, in place of what it has there.

    Encodings under other keys stay; those of related nodes do not.
    """
    kept = only_encodings(node.metadata, encoding_key)
    return with_hidden_metadata(stripped(node, encoding_key), {**kept, **under_key(encoding, encoding_key)})


def node_kind(encoding_key: str, metadata_mode: MetadataMode = MetadataMode.EMBED) -> DocumentKind[BaseNode]:
    """Return how write-back and backfill read nodes."""
    return DocumentKind(
        to_passage=lambda node: to_passage(node, encoding_key, metadata_mode),
        metadata=lambda node: node.metadata,
        has_text_of=_has_text_of,
        encoding_key=encoding_key,
    )


def _has_text_of(held: BaseNode, encoded: BaseNode) -> bool:
    text = encoded.get_content(MetadataMode.NONE)
    # Small-to-big retrieval (MetadataReplacementPostProcessor) encodes a text that a node has in its metadata.
    texts = [held.get_content(MetadataMode.NONE), *(value for value in held.metadata.values() if isinstance(value, str))]
    return text in texts
