"""What is known of passages' encodings before anything is encoded: read from their metadata, or kept in memory."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kalm_integrations.core.checkpoint.opened import Checkpoint
from kalm_integrations.core.checkpoint.prompts import PASSAGE_TEMPLATE, passage_text
from kalm_integrations.core.forks import ForkSafeLock, kept_property
from kalm_integrations.core.passages.by_text import TextLookup
from kalm_integrations.core.passages.caches import BoundedCache
from kalm_integrations.core.passages.encoding import EncodedPassage
from kalm_integrations.core.passages.expected import Expected, fingerprint
from kalm_integrations.core.passages.guarded import guard
from kalm_integrations.core.passages.strings import REFERENCE_PREFIX, hash_text
from kalm_integrations.core.passages.through import WriteThrough
from kalm_integrations.core.settings import EncoderSettings, StorageSettings
from kalm_integrations.core.types import AnyPassage, Passage, Reading, RuntimeStats, Status, checked_list, plain
from kalm_integrations.errors import CorruptEncodingError, SettingsError, StaleEncodingError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Decoded:
    """What a string was decoded to."""

    encoding: EncodedPassage
    nbytes: int
    """Bytes of the states, and of the string, which the cache keeps too."""


class Reader:
    """Reads encodings for one checkpoint and way to store; owns cache, payload store and counters of a reranker."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        encoder: EncoderSettings,
        storage: StorageSettings,
        cache_bytes: int,
        payload_store: MutableMapping[str, bytes] | None,
    ) -> None:
        """Make a reader with an empty cache."""
        self.payload_store = guard(payload_store, "payload_store", self.count, must_write=True)
        self._checkpoint = checkpoint
        self._encoder = encoder
        self._storage = storage
        self._ratio = storage.compression_ratio
        self.cache: BoundedCache[Hashable, EncodedPassage] = BoundedCache(cache_bytes)
        """By key (see `key`), and what was fetched by key and origin: an encoding that somebody else made serves none but the
        passages of where it lies."""
        self._decoded: BoundedCache[str, _Decoded] = BoundedCache(cache_bytes // 4)
        """By the whole string: what many queries ask for is decoded and checked once."""
        self.through: WriteThrough | None = None
        """Writes what was made into the payload store, if that is wanted."""
        unneeded = guard(payload_store, "payload_store", self.count, must_write=False)
        if unneeded is not None and storage.write_through:
            self.through = WriteThrough(unneeded, storage.max_store_bytes, self.count)
        self._stats = RuntimeStats()
        self._stats_lock = ForkSafeLock()
        self._warned: set[str] = set()

    @kept_property
    def fingerprint(self) -> str:
        """What makes an encoding: checkpoint content, tokenizer, template and encoder settings; 32 hex digits."""
        return self._fingerprint(self._encoder.facts)

    @kept_property
    def windows_fingerprint(self) -> str | None:
        """What makes an encoding of a passage in windows; None where it is cut."""
        return None if self._encoder.n_windows is None else self._fingerprint(self._encoder.window_facts)

    def _fingerprint(self, settings: Mapping[str, Any]) -> str:
        return fingerprint(
            {"checkpoint": self._checkpoint.identity, "template": PASSAGE_TEMPLATE, "settings": settings, "format": 1}
        )

    @property
    def name(self) -> str:
        """What a reading is of: who has another name scores with other encodings."""
        return f"{':'.join(self.expected.fingerprints)}:{self._ratio}"

    @property
    def stats(self) -> RuntimeStats:
        """A snapshot of the counters."""
        return self._stats

    def count(self, **increments: float) -> None:
        """Add to counters."""
        with self._stats_lock:
            counted = {name: getattr(self._stats, name) + n for name, n in increments.items()}
            self._stats = replace(self._stats, **counted)

    def warn_once(self, kind: str, message: str, *arguments: object) -> None:
        """Log a warning, the first of its kind only."""
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(message, *arguments)

    def read(self, passages: Iterable[AnyPassage]) -> Reading:
        """Find the encoding of each passage: in its metadata, in memory, or in the payload store. Each is decoded once.

        Raises:
            SettingsError: a passage has the wrong type.
            StaleEncodingError: an `EncodedPassage` was made by another checkpoint or encoder setting.
            CorruptEncodingError: an `EncodedPassage` is none that this checkpoint can have made.
        """
        passages = checked_list(passages, "passages")
        if not passages:
            # Not even the fingerprint is needed, for which the checkpoint is hashed.
            return Reading((), (), (), {}, "", {})
        statuses: list[Status] = []
        texts: list[str | None] = []
        keys: list[Hashable] = []
        found: dict[Hashable, EncodedPassage] = {}
        decoded: dict[object, EncodedPassage | Status] = {}
        known: dict[tuple[str, object], Status] = {}
        fetched: dict[Hashable, EncodedPassage] = {}
        origins: dict[Hashable, Hashable] = {}
        tally: Counter[str] = Counter()
        for passage in passages:
            if isinstance(passage, EncodedPassage):
                # A text may be given at several ratios on purpose: here the object decides what is the same.
                if id(passage) not in found:
                    passage.check(self.expected)
                    found[id(passage)] = self._at_ratio(passage, tally)
                statuses.append("stored")
                texts.append(None)
                keys.append(id(passage))
                continue
            given = passage if isinstance(passage, Passage) else Passage(passage)
            text, value, origin = plain(given.text), plain(given.encoding), given.origin
            if not isinstance(text, str):
                got = f"a Passage of {type(text).__name__}" if isinstance(passage, Passage) else type(passage).__name__
                msg = (
                    f"passages must be str, EncodedPassage or Passage (of str), but got {got} at place {len(texts)}; take the "
                    "text out of it, and give an encoding that is stored beside it as Passage(text, encoding)"
                )
                raise SettingsError(msg)
            key = self.key(text)
            # Metadata may hold anything; what is no string may not be hashable either.
            name = value if value is None or isinstance(value, str) else id(value)
            if name not in decoded:
                decoded[name] = self._decode(value)
            stored = decoded[name]
            if (key, name) not in known:
                known[key, name] = status = _status(stored, key)
                if status in ("stale", "corrupt"):
                    tally[status] += 1
                elif isinstance(stored, EncodedPassage) and key not in found:
                    tally["metadata_hits"] += 1
                    found[key] = self._at_ratio(stored, tally)
                    if origin is not None:
                        fetched[key, origin] = found[key]
            if origin is not None:
                origins.setdefault(key, origin)
            statuses.append(known[key, name])
            texts.append(text)
            keys.append(key)
        self.cache.put_many(fetched)
        cached = self._remember([key for key in dict.fromkeys(keys) if key not in found], origins)
        missing = [key for key in dict.fromkeys(keys) if key not in found and key not in cached]
        corrupt = {key for (key, _), status in known.items() if status == "corrupt"}
        in_store = self.find(missing, tally, corrupt)
        there = {**cached, **in_store}
        statuses = [
            _status_without(there.get(key)) if status == "missing" else status
            for key, status in zip(keys, statuses, strict=True)
        ]
        tally["cache_hits"] = tally["metadata_hits"] + len(cached) + len(in_store)
        return Reading(tuple(statuses), tuple(texts), tuple(keys), {**found, **there}, self.name, dict(tally))

    def find(
        self, keys: Sequence[Hashable], tally: Counter[str], corrupt: Collection[Hashable] = ()
    ) -> dict[Hashable, EncodedPassage]:
        """Return what the payload store has of texts, by their keys; from then on memory has it, too.

        Args:
            keys: of the texts.
            tally: where hits and damaged entries are counted.
            corrupt: keys of passages that are counted as corrupt already.
        """
        store = self.payload_store
        if store is None or not keys:
            return {}
        by_hash, damaged = self._lookup.find(store, list(map(str, keys)))
        found: dict[Hashable, EncodedPassage] = dict(by_hash.items())
        if damaged:
            tally["corrupt"] += len(damaged - set(map(str, corrupt)))
            self.warn_once("corrupt", "entries of the payload store are damaged and made anew (counted in stats.corrupt)")
        if found:
            tally["store_hits"] += len(found)
            self.cache.put_many(found)
            self._touch(found.values())
        return found

    @kept_property
    def _lookup(self) -> TextLookup:
        """What finds encodings in the payload store."""
        return TextLookup(self.expected, self._storage)

    def remembers(self, texts: Iterable[str]) -> bool:
        """Return whether memory has all texts, so that no store is asked for them."""
        keys = {self.key(text) for text in texts}
        return len(self.cache.get_many(keys)) == len(keys)

    def _touch(self, encodings: Iterable[EncodedPassage]) -> None:
        """Have a bounded store keep what is used, also if it is memory that serves it."""
        if self.through is not None:
            self.through.touch(encodings)

    def _remember(self, keys: Sequence[Hashable], origins: Mapping[Hashable, Hashable]) -> dict[Hashable, EncodedPassage]:
        """Return what memory has: what was made here, else what was fetched from the passage's own origin."""
        made = self.cache.get_many(keys)
        names: dict[Hashable, Hashable] = {(key, origins[key]): key for key in keys if key in origins and key not in made}
        fetched = self.cache.get_many(names)
        self._touch(made.values())
        return {**made, **{names[name]: encoding for name, encoding in fetched.items()}}

    def use(self, passages: Iterable[AnyPassage] | Reading) -> Reading:
        """Return the reading of passages, counted; one that was made before is taken as it is.

        Raises:
            SettingsError: a passage has the wrong type, or the reading is of another reranker.
            StaleEncodingError: an `EncodedPassage` was made by another checkpoint or encoder setting.
        """
        reading = passages if isinstance(passages, Reading) else self.read(passages)
        if reading and reading.read_by != self.name:
            msg = (
                f"a reading must be of this reranker's fingerprint and ratio, {self.name}, but is of "
                f"{reading.read_by}; read the passages again"
            )
            raise SettingsError(msg)
        self.count(**reading.tally)
        return reading

    def key(self, text: str) -> str:
        """Return what identifies a passage's text: the hash of what the encoder reads."""
        return hash_text(passage_text(text))

    @kept_property
    def expected(self) -> Expected:
        """What encodings of this checkpoint have in common."""
        width = self._checkpoint.encoder_config.hidden_width
        # Codecs move values by less than this: those that rotate keep the length of a mean and of a difference from it, which
        # is twice that of a state at most.
        limit = 4 * self._checkpoint.encoder_bound
        max_tokens, n_windows = self._encoder.max_passage_tokens, self._encoder.n_windows or 1
        return Expected(self.fingerprint, width, max_tokens, limit, self.windows_fingerprint, n_windows)

    def _decode(self, value: Any) -> EncodedPassage | Status:
        """Return the encoding of a metadata value, or what the value is if that is none of this checkpoint."""
        if value is None:
            return "missing"
        # A payload that a string refers to may be gone the next time.
        is_whole = isinstance(value, str) and not value.startswith(REFERENCE_PREFIX)
        known = self._decoded.get_many([value]) if is_whole else {}
        if known:
            return known[value].encoding
        try:
            encoding = EncodedPassage.from_metadata(value, self.payload_store, self.expected)
        except StaleEncodingError:
            return "stale"
        except CorruptEncodingError as error:
            self.warn_once("corrupt", "a stored encoding is made anew (counted in stats.corrupt): %s", error)
            return "corrupt"
        if is_whole:
            self._decoded.put_many({value: _Decoded(encoding, encoding.nbytes + len(value))})
        return encoding

    def _at_ratio(self, encoding: EncodedPassage, tally: Counter[str]) -> EncodedPassage:
        """Pool a finer encoding to the reranker's ratio; one that cannot be is scored at its own."""
        if encoding.compression_ratio > self._ratio:
            tally["coarser"] += 1
        elif encoding.compression_ratio < self._ratio and self._ratio % encoding.compression_ratio == 0:
            return encoding.pool(self._ratio)
        return encoding


def _status_without(encoding: EncodedPassage | None) -> Status:
    """Return the status of a passage that came without an encoding, by the one that there is."""
    return "missing" if encoding is None else "found" if encoding.is_shared else "cached"


def _status(stored: EncodedPassage | Status, key: str) -> Status:
    """Return what a metadata value, decoded, is to the text with a key."""
    if isinstance(stored, EncodedPassage):
        return "stored" if stored.text_hash == key else "stale"
    return stored
