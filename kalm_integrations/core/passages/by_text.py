"""Encodings in a payload store, found by the text of a passage that carries none."""

from __future__ import annotations

from collections.abc import Sequence

from kalm_integrations.core.passages.codecs import write_states
from kalm_integrations.core.passages.encoding import EncodedPassage, inline_length, payload_key
from kalm_integrations.core.passages.expected import Expected
from kalm_integrations.core.passages.guarded import GuardedStore
from kalm_integrations.core.settings import StorageSettings, poolable_ratios
from kalm_integrations.errors import CorruptEncodingError, StaleEncodingError

HALF_PRECISION = "bf16"
"""What states are written as that overflow another codec."""


class TextLookup:
    """Finds what one reranker would make of a text, and nothing else: a score must not depend on who wrote a store."""

    def __init__(self, expected: Expected, storage: StorageSettings) -> None:
        """Look for encodings of a checkpoint, stored in one way."""
        self._expected = expected
        self._storage = storage
        limit = storage.max_inline_bytes
        self._limit = None if storage.storage_mode == "reference" else limit
        ratio = storage.compression_ratio
        self._ratios = (ratio,) if self._limit is None else poolable_ratios(ratio)
        codec = storage.storage_codec
        codecs = (codec,) if codec in ("fp32", HALF_PRECISION) else (codec, HALF_PRECISION)
        self._ways = [(fp, ratio, codec) for fp in expected.fingerprints for codec in codecs for ratio in self._ratios]

    def find(self, store: GuardedStore, hashes: Sequence[str]) -> tuple[dict[str, EncodedPassage], set[str]]:
        """Return the encodings that are there by the hashes of their texts, and the texts whose entries are damaged."""
        names = {th: [(way, payload_key(way[0], th, *way[1:])) for way in self._ways] for th in hashes}
        entries = store.get_many([name for of_text in names.values() for _, name in of_text])
        found: dict[str, EncodedPassage] = {}
        damaged: set[str] = set()
        for th, of_text in names.items():
            there = [(way, entries[name]) for way, name in of_text if name in entries]
            for (fingerprint, ratio, codec), entry in there:
                try:
                    encoding = EncodedPassage.from_payload(entry, fingerprint, th, ratio, codec, self._expected)
                except StaleEncodingError:
                    # Somebody else's, who cuts passages.
                    continue
                except CorruptEncodingError:
                    damaged.add(th)
                    continue
                if self._is_what_we_make(encoding):
                    encoding.note_shared()
                    found[th] = encoding
                    break
        return found, damaged

    def _is_what_we_make(self, encoding: EncodedPassage) -> bool:
        wanted = self._storage.storage_codec
        if encoding.codec != wanted and write_states(encoding.states, wanted)[0] != encoding.codec:
            return False
        return self._limit is None or encoding.compression_ratio == self._fitting_ratio(encoding, self._limit)

    def _fitting_ratio(self, encoding: EncodedPassage, limit: int) -> int:
        """Return the finest ratio whose string fits; where none does, the encoding stays as it is."""
        width, codec, windows = encoding.states.shape[1], encoding.codec, encoding.windows
        lengths = ((ratio, inline_length(encoding.n_tokens, ratio, width, codec, windows)) for ratio in self._ratios)
        fitting = (ratio for ratio, length in lengths if length <= limit)
        return next(fitting, self._storage.compression_ratio)
