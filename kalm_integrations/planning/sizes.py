"""Characters and bytes: of metadata strings, in stores, and in the caches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kalm_integrations.core.model.prefix_states import kept_bytes
from kalm_integrations.core.passages.codecs import CODECS, EXACT_CODECS
from kalm_integrations.core.passages.encoding import inline_length
from kalm_integrations.core.passages.prefixes import PREFIX_DTYPES
from kalm_integrations.core.passages.windows import table_bytes
from kalm_integrations.core.settings import CODEC_NAMES, COMPRESSION_RATIOS
from kalm_integrations.core.sizes import n_pooled_states
from kalm_integrations.hosting.limits import LUCENE_TERM_BYTES, MILVUS_VARCHAR_BYTES, PINECONE_METADATA_BYTES
from kalm_integrations.planning.reading import PassageRead
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


def length(shape: Shape, read: PassageRead, ratio: int, codec: str) -> int:
    """Return the characters of a passage's metadata."""
    return inline_length(read.n_tokens, ratio, shape.encoder.hidden_width, codec, read.windows)


def lengths(shape: Shape, read: PassageRead, ratio: int) -> dict[int, dict[str, int]]:
    """Return the characters of a passage's metadata by ratio and codec; `ratio` is one of the ratios."""
    ratios = sorted({ratio, *(each for each in COMPRESSION_RATIOS if each <= shape.max_ratio)})
    return {each: {codec: length(shape, read, each, codec) for codec in CODEC_NAMES} for each in ratios}


def payload_bytes(shape: Shape, read: PassageRead, ratio: int, codec: str) -> int:
    """Return the bytes of a passage in a payload store: of its states as a codec writes them, and of what its windows are."""
    return _state_bytes(shape, read, ratio, codec) + (0 if read.windows is None else table_bytes(len(read.windows)))


def room_in(n_tokens: int) -> dict[str, int]:
    """Return the bytes that each store with a limit leaves for the encoding of a passage."""
    text = round(TEXT_BYTES_PER_TOKEN * n_tokens)
    return {name: max(limit - (text if name in _WITH_TEXT else 0), 0) for name, limit in LIMITS.items()}


def finest(by_ratio: dict[int, dict[str, int]], codecs: Iterable[str], room: int) -> dict[str, int | None]:
    """Return for each codec the finest ratio whose string fits, or None."""
    return {codec: next((ratio for ratio in by_ratio if by_ratio[ratio][codec] <= room), None) for codec in codecs}


def encoding_bytes(shape: Shape, read: PassageRead, ratio: int, codec: str) -> int:
    """Return the bytes of a passage's encoding in memory: float32 states, and their payload if it is kept."""
    states = _state_bytes(shape, read, ratio, "fp32")
    return states + (0 if codec in EXACT_CODECS else _state_bytes(shape, read, ratio, codec))


def prefix_bytes(shape: Shape, read: PassageRead, ratio: int, dtype: str) -> int:
    """Return the bytes of a passage's prefix states, kept in a dtype of `PREFIX_DTYPES`: each window has its own."""
    n_layers, n_heads = len(shape.decoder.layer_types), shape.n_kv_heads

    def of_part(n_tokens: int) -> int:
        n_kept = n_pooled_states(n_tokens, ratio) + shape.n_prefix
        return kept_bytes((n_layers, 2, n_heads, n_kept, shape.decoder.kv_width // n_heads), PREFIX_DTYPES[dtype])

    return sum(of_part(n_tokens) * n_parts for n_tokens, n_parts in read.sizes.items())


def _state_bytes(shape: Shape, read: PassageRead, ratio: int, codec: str) -> int:
    return CODECS[codec].n_bytes(read.n_states(ratio), shape.encoder.hidden_width)
