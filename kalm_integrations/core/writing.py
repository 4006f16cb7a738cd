"""Texts to encodings, and encodings to the metadata that a host stores."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable, Mapping, Sequence

from kalm_integrations.core.checkpoint.prompts import passage_text
from kalm_integrations.core.passages.encoding import EncodedPassage
from kalm_integrations.core.passes import encode_tokens
from kalm_integrations.core.reading import Reader
from kalm_integrations.core.runtime import Runtime
from kalm_integrations.core.settings import EncoderSettings, StorageSettings, poolable_ratios
from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY, Metadata, checked_flag, checked_texts
from kalm_integrations.errors import EncodingTooLargeError


class Writer:
    """Encodes what a reader does not find, and writes metadata."""

    def __init__(
        self, runtime: Runtime, reader: Reader, encoder: EncoderSettings, storage: StorageSettings, batch_size: int | None
    ) -> None:
        """Make a writer; `batch_size` is in passages, None chooses by device."""
        self._runtime = runtime
        self._reader = reader
        self._encoder = encoder
        self._storage = storage
        self._batch_size = batch_size

    def encode_texts(self, texts: Iterable[str], *, show_progress: bool = False) -> list[EncodedPassage]:
        """Return the encoding of each text, in order; duplicates, and what is in memory, are not encoded again.

        Raises:
            SettingsError: `texts` is one string, or holds something else than strings.
        """
        checked = checked_texts(texts)
        show_progress = checked_flag(show_progress, "show_progress")
        keys = [self._reader.key(text) for text in checked]
        encodings = self.encode(dict(zip(keys, checked, strict=True)), show_progress=show_progress)
        return [encodings[key] for key in keys]

    def encode(self, texts: Mapping[Hashable, str], *, show_progress: bool = False) -> dict[Hashable, EncodedPassage]:
        """Return the encodings of texts by key, from memory or from the encoder, at the reranker's ratio."""
        if not texts:
            return {}
        # Under the model's lock, so that what another thread is encoding right now is found in memory afterwards.
        with self._runtime.lock:
            found = self._reader.cache.get_many(texts)
            missing = {key: text for key, text in texts.items() if key not in found}
            made = self._encode_now(missing, show_progress=show_progress) if missing else {}
            self._reader.cache.put_many(made)
        self._reader.count(cache_hits=len(found), cache_misses=len(missing))
        return found | made

    def fit_inline(self, encodings: Sequence[EncodedPassage]) -> list[EncodedPassage]:
        """Return each encoding at the finest published ratio whose string has at most `max_inline_bytes`.

        Raises:
            EncodingTooLargeError: one does not fit, and its payload may not go elsewhere; the error has its `index`.
        """
        if self._storage.max_inline_bytes is None or self._storage.storage_mode == "reference":
            return list(encodings)
        fitting: dict[int, EncodedPassage] = {}
        for index, encoding in enumerate(encodings):
            if id(encoding) not in fitting:
                fitting[id(encoding)] = self._fit(encoding, index)
        return [fitting[id(encoding)] for encoding in encodings]

    def to_metadata(self, encodings: Sequence[EncodedPassage]) -> list[Metadata]:
        """Return what to store with each passage; payloads that are referred to go into the payload store, all at once.

        Raises:
            EncodingTooLargeError: see `fit_inline`.
        """
        payloads: dict[str, bytes] = {}
        fitting = self.fit_inline(encodings)
        values = [encoding.to_metadata(payloads if self._is_referenced(encoding) else None) for encoding in fitting]
        if payloads and self._reader.payload_store is not None:
            self._reader.payload_store.update(payloads)
        return [
            {ENCODING_KEY: value, FINGERPRINT_KEY: encoding.fingerprint}
            for value, encoding in zip(values, fitting, strict=True)
        ]

    def _encode_now(self, texts: Mapping[Hashable, str], *, show_progress: bool) -> dict[Hashable, EncodedPassage]:
        started = time.perf_counter()
        tokenizer = self._runtime.tokenizer(allow_special_tokens=self._encoder.allow_special_tokens)
        whole = tokenizer.passages([passage_text(text) for text in texts.values()])
        limit = self._encoder.max_passage_tokens
        n_truncated = sum(len(ids) > limit for ids in whole)
        if n_truncated:
            rule = "%d of %d passages are longer than max_passage_tokens=%d and were cut (counted in stats.truncated)"
            self._reader.warn_once("truncated", rule, n_truncated, len(whole), limit)
        token_ids = [ids[:limit] for ids in whole]
        ratio, codec = self._storage.compression_ratio, self._storage.storage_codec
        states = encode_tokens(self._runtime, token_ids, ratio, self._batch_size, show_progress=show_progress)
        seconds = time.perf_counter() - started
        self._reader.count(passages_encoded=len(texts), truncated=n_truncated, encode_seconds=seconds)
        current = self._reader.fingerprint
        return {
            key: EncodedPassage(rows, len(ids), ratio, current, str(key), codec)
            for key, ids, rows in zip(texts, token_ids, states, strict=True)
        }

    def _fit(self, encoding: EncodedPassage, index: int) -> EncodedPassage:
        limit = self._storage.max_inline_bytes
        if limit is None:
            return encoding
        for ratio in poolable_ratios(encoding.compression_ratio):
            pooled = encoding.pool(ratio)
            if pooled.metadata_length() <= limit:
                return pooled
        if self._reader.payload_store is not None and self._storage.storage_mode == "auto":
            return encoding
        msg = (
            f"an encoding must fit max_inline_bytes={limit}, but this one takes "
            f"{pooled.metadata_length()} characters even at ratio {pooled.compression_ratio}; raise max_inline_bytes, use a "
            "smaller storage_codec, or give a payload_store"
        )
        raise EncodingTooLargeError(msg, index=index)

    def _is_referenced(self, encoding: EncodedPassage) -> bool:
        """Return whether an encoding's payload goes into the payload store."""
        mode, limit = self._storage.storage_mode, self._storage.max_inline_bytes
        return mode == "reference" or (mode == "auto" and limit is not None and encoding.metadata_length() > limit)
