"""Characters and bytes: of metadata strings, in stores, and in the caches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kalm_integrations.core.model.prefix_states import kept_bytes
from kalm_integrations.core.passages.codecs import CODECS, EXACT_CODECS
from kalm_integrations.core.passages.encoding import inline_length
from kalm_integrations.core.passages.prefixes import PREFIX_DTYPES
from kalm_integrations.core.settings import CODEC_NAMES, COMPRESSION_RATIOS
from kalm_integrations.core.sizes import n_pooled_states
from kalm_integrations.hosting.limits import LUCENE_TERM_BYTES, MILVUS_VARCHAR_BYTES, PINECONE_METADATA_BYTES
from kalm_integrations.planning.shapes import Shape

QUEUED = 1_000
"""Passages that Chroma holds once more until it writes its index, in room that it keeps afterwards."""

TEXT_BYTES_PER_TOKEN = 4.5
"""Of English, to say what a text leaves of a limit that it shares."""

LIMITS = {
    "OpenSearch, Elasticsearch": LUCENE_TERM_BYTES,
    "Milvus, static schema": MILVUS_VARCHAR_BYTES,
    "Pinecone, less the text": PINECONE_METADATA_BYTES,
}
"""Bytes that a store takes for an encoding, or for text and encoding together."""
_WITH_TEXT = ("Pinecone, less the text",)


@dataclass(frozen=True)
class StoreModel:
    """What encodings take in a store beside text and vectors, as measured."""

    per_passage: float
    per_byte: float
    """Of the metadata string, or of the payload where the store holds payloads."""
    per_queued_byte: float
    """On top of it, of the first `QUEUED` passages."""
    holds_payloads: bool

    def n_bytes(self, passages: int, characters: float, payload: float) -> int:
        """Return bytes for passages whose metadata string, or payload, is so long on average."""
        size = payload if self.holds_payloads else characters
        queued = min(passages, QUEUED) * self.per_queued_byte * size
        return round(passages * (self.per_passage + self.per_byte * size) + queued)


def lengths(shape: Shape, n_tokens: int, ratio: int) -> dict[int, dict[str, int]]:
    """Return the characters of a passage's metadata by ratio and codec; `ratio` is one of the ratios."""
    ratios = sorted({ratio, *(each for each in COMPRESSION_RATIOS if each <= shape.max_ratio)})
    width = shape.encoder.hidden_width
    return {each: {codec: inline_length(n_tokens, each, width, codec) for codec in CODEC_NAMES} for each in ratios}


def payload_bytes(shape: Shape, n_tokens: int, ratio: int, codec: str) -> int:
    """Return the bytes of a passage's states as a codec writes them."""
    return CODECS[codec].n_bytes(n_pooled_states(n_tokens, ratio), shape.encoder.hidden_width)


def room_in(n_tokens: int) -> dict[str, int]:
    """Return the bytes that each store with a limit leaves for the encoding of a passage."""
    text = round(TEXT_BYTES_PER_TOKEN * n_tokens)
    return {name: max(limit - (text if name in _WITH_TEXT else 0), 0) for name, limit in LIMITS.items()}


def finest(by_ratio: dict[int, dict[str, int]], codecs: Iterable[str], room: int) -> dict[str, int | None]:
    """Return for each codec the finest ratio whose string fits, or None."""
    return {codec: next((ratio for ratio in by_ratio if by_ratio[ratio][codec] <= room), None) for codec in codecs}


def encoding_bytes(shape: Shape, n_tokens: int, ratio: int, codec: str) -> int:
    """Return the bytes of a passage's encoding in memory: float32 states, and their payload if it is kept."""
    states = payload_bytes(shape, n_tokens, ratio, "fp32")
    return states + (0 if codec in EXACT_CODECS else payload_bytes(shape, n_tokens, ratio, codec))


def prefix_bytes(shape: Shape, n_tokens: int, ratio: int, dtype: str) -> int:
    """Return the bytes of a passage's prefix states, kept in a dtype of `PREFIX_DTYPES`."""
    n_layers, n_heads = len(shape.decoder.layer_types), shape.n_kv_heads
    n_kept = n_pooled_states(n_tokens, ratio) + shape.n_prefix
    return kept_bytes((n_layers, 2, n_heads, n_kept, shape.decoder.kv_width // n_heads), PREFIX_DTYPES[dtype])
