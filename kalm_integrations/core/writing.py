"""Texts to encodings, and encodings to the metadata that a host stores."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from kalm_integrations.core.checkpoint.prompts import passage_text
from kalm_integrations.core.flows import Flow
from kalm_integrations.core.jobs import Job, Work, in_passages
from kalm_integrations.core.passages.caches import BoundedCache
from kalm_integrations.core.passages.encoding import EncodedPassage
from kalm_integrations.core.passages.windows import Windows
from kalm_integrations.core.passes import (
    check_states,
    check_vocabulary,
    choose_batch_size,
    choose_batch_tokens,
    encode_batch,
)
from kalm_integrations.core.reading import Reader
from kalm_integrations.core.runtime import Runtime
from kalm_integrations.core.settings import EncoderSettings, StorageSettings, poolable_ratios
from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY, Metadata, checked_flag, checked_texts
from kalm_integrations.core.windowing import Windower
from kalm_integrations.errors import EncodingTooLargeError, NonFiniteScoreError

BULK_SLICE = 4096
"""Passages that bulk work looks up, tokenises and queues at a time, the next ones while these are being encoded."""
BULK_CHARACTERS = 2**24
"""Of these passages: long ones have many windows, and the states of all of them are held until they are done."""


@dataclass(frozen=True)
class _Tokenised:
    """What the encoder is to read, by key."""

    token_ids: dict[Hashable, list[list[int]]]
    """Of the passage's windows, or of all of it."""
    windows: dict[Hashable, Windows]
    """Of the passages that are encoded in windows."""
    cut: set[Hashable]
    """Those of which it does not read everything."""
    seconds: float


@dataclass(frozen=True)
class _LookedUp:
    """Some of the passages of bulk work."""

    found: dict[Hashable, EncodedPassage]
    missing: dict[Hashable, str]
    in_memory: set[Hashable]
    """The keys that were found there, not in the payload store."""
    tokenised: _Tokenised


@dataclass(frozen=True)
class _Unencoded:
    """A passage to encode."""

    key: Hashable
    token_ids: list[int]
    cache: BoundedCache[Hashable, EncodedPassage]
    """Where another request may have left the encoding meanwhile."""
    finish: Callable[[Hashable, list[int], torch.Tensor], EncodedPassage]
    """Makes an encoding of key, tokens and states."""


def _encode_work(runtime: Runtime, ratio: int, batch_size: int | None) -> Work[_Unencoded, tuple[EncodedPassage, bool]]:
    """Return how passages are encoded: into their encodings, and whether each had to be made."""

    def encode(rows: list[_Unencoded]) -> list[tuple[EncodedPassage, bool]]:
        # Those of one cache and key are of one reranker and text, whoever asks.
        names = [(id(row.cache), row.key) for row in rows]
        known = {name: row.cache.get_many([row.key]).get(row.key) for name, row in zip(names, rows, strict=True)}
        missing = {name: row for name, row in zip(names, rows, strict=True) if known[name] is None}
        all_states = encode_batch(runtime, [row.token_ids for row in missing.values()], ratio) if missing else []
        made = {}
        for (name, row), states in zip(missing.items(), all_states, strict=True):
            made[name] = encoding = row.finish(row.key, row.token_ids, states)
            if bool(states.isfinite().all()):
                row.cache.put_many({row.key: encoding})
        results = []
        for name in names:
            found = known[name]
            results.append((made[name], True) if found is None else (found, False))
            # What a second request asks for is there by now.
            known[name] = known[name] or made[name]
        return results

    return Work(
        encode,
        batch_size or choose_batch_size("encode", runtime),
        ("encode", ratio),
        length=lambda row: len(row.token_ids),
        max_tokens=choose_batch_tokens(runtime) if batch_size is None else None,
    )


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

    def encode_texts(self, texts: Iterable[str], *, show_progress: bool = False) -> Flow[list[EncodedPassage]]:
        """Return the encoding of each text, in order, as bulk work; duplicates, and what is in memory, are not encoded again.

        Raises:
            SettingsError: `texts` is one string, or holds something else than strings.
        """
        checked = checked_texts(texts)
        is_shown = checked_flag(show_progress, "show_progress")
        keys: list[Hashable] = [self._reader.key(text) for text in checked]
        unique = list(dict(zip(keys, checked, strict=True)).items())
        encodings: dict[Hashable, EncodedPassage] = {}
        slices = list(_slices(unique))
        with (
            tqdm(total=len(unique), desc="Encoding", unit="passage", disable=not is_shown) as progress,
            ThreadPoolExecutor(1, thread_name_prefix="kalm-ahead") as ahead,
        ):
            looked_up = self._look_up(slices[0]) if slices else None
            for following in (*slices[1:], None):
                if looked_up is None:
                    break
                next_looked_up = None if following is None else ahead.submit(self._look_up, following)
                encodings |= yield from self._encode_bulk(looked_up, progress.update)
                looked_up = None if next_looked_up is None else next_looked_up.result()
        return [encodings[key] for key in keys]

    def _look_up(self, texts: dict[Hashable, str]) -> _LookedUp:
        """Look texts up by key in memory and the payload store, and tokenise those that are in neither."""
        tally: Counter[str] = Counter()
        in_memory = set(self._reader.cache.get_many(texts))
        found = self._reader.find([key for key in texts if key not in in_memory], tally)
        self._reader.count(**tally, cache_hits=len(found))
        missing = {key: text for key, text in texts.items() if key not in found}
        unknown = {key: text for key, text in missing.items() if key not in in_memory}
        return _LookedUp(found, missing, in_memory, self._tokenise(unknown))

    def _encode_bulk(self, some: _LookedUp, report: Callable[[int], object]) -> Flow[dict[Hashable, EncodedPassage]]:
        """Return the encodings of passages by key, found or made; those that are made are written to the payload store."""
        report(len(some.found))
        made = yield from self.encode(some.missing, is_bulk=True, report=report, tokenised=some.tokenised)
        if self._reader.through is not None:
            self._reader.through.put_now(encoding for key, encoding in made.items() if key not in some.in_memory)
        return {**some.found, **made}

    def encode(
        self,
        texts: Mapping[Hashable, str],
        *,
        is_bulk: bool = False,
        report: Callable[[int], object] | None = None,
        tokenised: _Tokenised | None = None,
    ) -> Flow[dict[Hashable, EncodedPassage]]:
        """Return the encodings of texts by key, from memory or from the encoder, at the reranker's ratio.

        Args:
            texts: what the passages are, by key.
            is_bulk: no query waits for them.
            report: is told how many have been done since it was last called.
            tokenised: what the encoder reads of those that were not in memory a moment ago; None: is found out here.
        """
        found = self._reader.cache.get_many(texts)
        missing = {key: text for key, text in texts.items() if key not in found}
        if report is not None:
            report(len(found))
        n_found = len(found)
        if missing:
            if tokenised is None or not tokenised.token_ids.keys() >= missing.keys():
                tokenised = self._tokenise(missing)
            made, n_made = yield from self._encode_now(missing, tokenised, is_bulk=is_bulk, report=report)
            found |= made
            n_found += len(made) - n_made
        self._reader.count(cache_hits=n_found, cache_misses=len(texts) - n_found)
        return found

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
            StoreError: the payload store failed: a reference to what is not there would be worth nothing.
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

    def _tokenise(self, texts: Mapping[Hashable, str]) -> _Tokenised:
        """Return what the encoder reads of texts, by key."""
        started = time.perf_counter()
        tokenizer = self._runtime.tokenizer(allow_special_tokens=self._encoder.allow_special_tokens)
        limit, n_windows = self._encoder.max_passage_tokens, self._encoder.n_windows
        # One more than the limit tells which passages are longer.
        given = tokenizer.passages([passage_text(text) for text in texts.values()], limit + 1)
        token_ids = {key: [ids[:limit]] for key, ids in zip(texts, given, strict=True)}
        cut = {key for key, ids in zip(texts, given, strict=True) if len(ids) > limit}
        windows = {}
        if n_windows is not None:
            windower = Windower(tokenizer, limit, n_windows)
            # One that just fits looks like one that was cut, so it says that it is one window.
            long = [key for key, ids in token_ids.items() if len(ids[0]) == limit]
            divided = {key: windower.divide(texts[key]) for key in long}
            token_ids |= {key: found.token_ids for key, found in divided.items()}
            windows = {key: found.windows for key, found in divided.items()}
            cut = {key for key, found in divided.items() if not found.is_whole}
        if cut:
            most = f"max_passage_tokens={limit}" if n_windows is None else f"max_windows={n_windows} of {limit} tokens"
            rule = "%d of %d passages are longer than %s and were cut (counted in stats.truncated)"
            self._reader.warn_once("truncated", rule, len(cut), len(given), most)
        check_vocabulary([ids for each in token_ids.values() for ids in each], self._runtime.checkpoint.encoder_config)
        return _Tokenised(token_ids, windows, cut, time.perf_counter() - started)

    def _encode_now(
        self,
        texts: Mapping[Hashable, str],
        tokenised: _Tokenised,
        *,
        is_bulk: bool,
        report: Callable[[int], object] | None,
    ) -> Flow[tuple[dict[Hashable, EncodedPassage], int]]:
        """Return encodings by key, and how many of them had to be made: some may have come into memory meanwhile."""
        ratio = self._storage.compression_ratio

        def finish(key: Hashable, ids: list[int], states: torch.Tensor) -> EncodedPassage:
            return self._as_stored(self._encoding(key, states, len(ids)))

        def finish_window(key: Hashable, ids: list[int], states: torch.Tensor) -> EncodedPassage:
            return self._encoding(key[0] if isinstance(key, tuple) else key, states, len(ids))

        rows = []
        for key in texts:
            all_ids = tokenised.token_ids[key]
            if key in tokenised.windows:
                for index, ids in enumerate(all_ids):
                    rows.append(_Unencoded((key, "window", index), ids, self._reader.cache, finish_window))
            else:
                rows.append(_Unencoded(key, all_ids[0], self._reader.cache, finish))
        # Like lengths together, so that little is padded.
        rows.sort(key=lambda row: -len(row.token_ids))
        work = _encode_work(self._runtime, ratio, self._batch_size)
        job = Job(work, rows, is_bulk=is_bulk, report=report and in_passages(report, len(rows), len(texts)))
        results: list[tuple[EncodedPassage, bool]] = yield job
        check_states([encoding.states for encoding, _ in results], self._runtime)
        encodings = {row.key: encoding for row, (encoding, _) in zip(rows, results, strict=True)}
        made = {row.key for row, (_, is_made) in zip(rows, results, strict=True) if is_made}
        for key, windows in tokenised.windows.items():
            if key in texts:
                parts = [(key, "window", index) for index in range(len(windows))]
                encodings[key] = self._joined(key, windows, [encodings.pop(part) for part in parts])
                if not made.isdisjoint(parts):
                    made = made.difference(parts) | {key}
                self._reader.cache.put_many({key: encodings[key]})
                self._reader.cache.drop_many(parts)
        self._reader.count(
            passages_encoded=len(made),
            truncated=len(tokenised.cut & made),
            windowed=sum(len(tokenised.windows.get(key, ())) > 1 for key in made),
            encode_seconds=tokenised.seconds + job.seconds,
        )
        return encodings, len(made)

    def _joined(self, key: Hashable, windows: Windows, parts: Sequence[EncodedPassage]) -> EncodedPassage:
        """Return the encoding of a passage whose windows were encoded each on its own."""
        states = torch.cat([part.states for part in parts])
        return self._as_stored(self._encoding(key, states, sum(window.n_tokens for window in windows), windows))

    def _encoding(self, key: Hashable, states: torch.Tensor, n_tokens: int, windows: Windows | None = None) -> EncodedPassage:
        """Return an encoding of this reranker's kind."""
        name = self._reader.fingerprint if windows is None else self._reader.windows_fingerprint
        ratio, codec = self._storage.compression_ratio, self._storage.storage_codec
        return EncodedPassage(states, n_tokens, ratio, name or "", str(key), codec, windows)

    def _as_stored(self, encoding: EncodedPassage) -> EncodedPassage:
        """Return an encoding as it will be read back, so that a score does not depend on whether that has happened yet.

        One that cannot be stored is told of where it is to be stored, or where its states are checked; others share its batch.
        """
        with contextlib.suppress(EncodingTooLargeError):
            [encoding] = self.fit_inline([encoding])
        with contextlib.suppress(NonFiniteScoreError):
            encoding = encoding.as_stored()
        return encoding

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


def _slices(texts: Sequence[tuple[Hashable, str]]) -> Iterator[dict[Hashable, str]]:
    """Cut texts into what bulk work does at a time."""
    some: dict[Hashable, str] = {}
    n_characters = 0
    for key, text in texts:
        n_characters += len(text)
        if some and (len(some) == BULK_SLICE or n_characters > BULK_CHARACTERS):
            yield some
            some, n_characters = {}, len(text)
        some[key] = text
    if some:
        yield some
