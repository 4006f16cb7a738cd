"""Nodes with and without encodings. Every function returns copies; the nodes that it is given stay as they are."""

from __future__ import annotations

from collections.abc import Mapping

from llama_index.core.schema import BaseNode, MetadataMode, RelatedNodeInfo

from kalm_integrations.core.types import FINGERPRINT_KEY, FUSED_SCORE_KEY, Passage

RETRIEVAL_SCORE_KEY = "retrieval_score"
"""Where rerankers of LlamaIndex keep the score that a node came with."""


def attach(node: BaseNode, metadata: Mapping[str, str], encoding_key: str) -> BaseNode:
    """Return a copy with `metadata` (an encoding and its fingerprint), which neither prompts nor embeddings will show."""
    return with_hidden_metadata(strip(node, encoding_key), metadata)


def with_hidden_metadata(node: BaseNode, metadata: Mapping[str, object]) -> BaseNode:
    """Return a copy with more metadata, its keys excluded from the text for embedding models and for LLMs."""
    return node.model_copy(
        update={
            "metadata": {**node.metadata, **metadata},
            "excluded_embed_metadata_keys": list(dict.fromkeys([*node.excluded_embed_metadata_keys, *metadata])),
            "excluded_llm_metadata_keys": list(dict.fromkeys([*node.excluded_llm_metadata_keys, *metadata])),
        }
    )


def strip(node: BaseNode, encoding_key: str) -> BaseNode:
    """Return a copy without encoding, its own or those of related nodes."""
    return _without(node, {encoding_key, FINGERPRINT_KEY})


def to_passage(node: BaseNode, encoding_key: str, metadata_mode: MetadataMode) -> Passage:
    """Return what is encoded of a node, with the encoding that it carries.

    The text is that of the node without what rerankers add to it: it is the same before ingest, after retrieval, and behind
    another reranker that keeps the retrieval score or fuses it.
    """
    clean = _without(node, {encoding_key, FINGERPRINT_KEY, FUSED_SCORE_KEY, RETRIEVAL_SCORE_KEY})
    return Passage(clean.get_content(metadata_mode=metadata_mode), node.metadata.get(encoding_key))


def _without(node: BaseNode, keys: set[str]) -> BaseNode:
    def is_kept(key: str) -> bool:
        return key not in keys

    def clean(related: RelatedNodeInfo) -> RelatedNodeInfo:
        return related.model_copy(update={"metadata": {k: v for k, v in related.metadata.items() if is_kept(k)}})

    return node.model_copy(
        update={
            "metadata": {key: value for key, value in node.metadata.items() if is_kept(key)},
            "excluded_embed_metadata_keys": list(filter(is_kept, node.excluded_embed_metadata_keys)),
            "excluded_llm_metadata_keys": list(filter(is_kept, node.excluded_llm_metadata_keys)),
            "relationships": {
                kind: [clean(r) for r in related] if isinstance(related, list) else clean(related)
                for kind, related in node.relationships.items()
            },
        }
    )
