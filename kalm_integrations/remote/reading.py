"""What the encodings in passages' metadata are worth, seen from the client: by their strings, which say it all but the states.

The statuses are those that the service's own reader gives, as far as they are of the metadata; hosts write back and refuse by
them. What the service has of passages that come with none is its affair, and told by its answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kalm_integrations.core.checkpoint.prompts import passage_text
from kalm_integrations.core.passages.caches import BoundedCache
from kalm_integrations.core.passages.expected import is_current
from kalm_integrations.core.passages.strings import Fields, hash_text, read_string
from kalm_integrations.core.types import Passage, Reading, Status, plain
from kalm_integrations.errors import CorruptEncodingError, SettingsError, StaleEncodingError
from kalm_integrations.remote.protocol import ServiceFacts

MEMORY_BYTES = 64 * 2**20
"""Of what is remembered about passages, fetched strings included."""

_ENTRY_BYTES = 256


@dataclass(frozen=True)
class _Known:
    """A passage that the service has scored; and its encoding, if it was fetched from the passage's origin."""

    encoding: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes, about."""
        return _ENTRY_BYTES + len(self.encoding or "")


class Reader:
    """Reads passages for one service; remembers what that has scored, and what was fetched for it."""

    def __init__(self) -> None:
        """Make a reader that remembers nothing."""
        self._memory: BoundedCache[Hashable, _Known] = BoundedCache(MEMORY_BYTES)

    def read(self, passages: Sequence[Any], facts: ServiceFacts) -> Reading:
        """Return a status for each passage; the strings of valid encodings are what was found.

        Raises:
            SettingsError: a passage is neither a text nor a `Passage`.
        """
        statuses: list[Status] = []
        texts: list[str] = []
        keys: list[str] = []
        found: dict[Hashable, str] = {}
        origins: dict[str, Hashable] = {}
        fetched: dict[Hashable, _Known] = {}
        worth: dict[object, str | Status] = {}
        odd: dict[tuple[str, object], Status] = {}
        for passage in passages:
            text, value, origin = _parts(passage)
            key = hash_text(passage_text(text))
            # Metadata may hold anything; what is no string may not be hashable either.
            name = value if value is None or isinstance(value, str) else id(value)
            if name not in worth:
                worth[name] = _worth(value, facts)
            status = _status(worth[name], key)
            if status == "stored":
                found.setdefault(key, value)
                if origin is not None:
                    fetched[key, origin] = _Known(value)
            elif status != "missing":
                odd[key, name] = status
            if origin is not None:
                origins.setdefault(key, origin)
            statuses.append(status)
            texts.append(text)
            keys.append(key)
        tally = Counter[str](odd.values())
        tally["metadata_hits"] = len(found)
        self._memory.put_many(fetched)
        known = self._remember([key for key in dict.fromkeys(keys) if key not in found], origins)
        statuses = [
            "cached" if status == "missing" and key in known else status for key, status in zip(keys, statuses, strict=True)
        ]
        found |= {key: entry.encoding for key, entry in known.items() if entry.encoding is not None}
        return Reading(tuple(statuses), tuple(texts), tuple(keys), found, name_of(facts), dict(tally))

    def _remember(self, keys: Sequence[str], origins: Mapping[str, Hashable]) -> dict[Hashable, _Known]:
        """Return what is known of texts: that the service has them, or what was fetched from the passage's own origin."""
        scored: dict[Hashable, _Known] = self._memory.get_many(keys)
        names: dict[Hashable, Hashable] = {(key, origins[key]): key for key in keys if key in origins and key not in scored}
        return scored | {names[name]: entry for name, entry in self._memory.get_many(names).items()}

    def note_scored(self, keys: Sequence[Hashable]) -> None:
        """Remember texts of which the service has an encoding of its own."""
        self._memory.put_many(dict.fromkeys(keys, _Known()))

    def forget(self) -> None:
        """Forget everything: the service has another model."""
        self._memory.clear()


def name_of(facts: ServiceFacts) -> str:
    """Return what a reading is of."""
    return f"{':'.join(facts.fingerprints)}:{facts.compression_ratio}"


def _parts(passage: Any) -> tuple[str, Any, Hashable | None]:
    """Return a passage's text, the value of its metadata, and its origin."""
    given = passage if isinstance(passage, Passage) else Passage(passage)
    text = plain(given.text)
    if not isinstance(text, str):
        got = f"a Passage of {type(text).__name__}" if isinstance(passage, Passage) else type(passage).__name__
        msg = (
            f"a service scores str and Passage (of str), but got {got}; of an EncodedPassage make "
            "Passage(text, encoding.to_metadata())"
        )
        raise SettingsError(msg)
    return text, plain(given.encoding), given.origin


def _worth(value: Any, facts: ServiceFacts) -> str | Status:
    """Return the hash of the text that a valid encoding is of, or what the value is instead."""
    if value is None:
        return "missing"

    def check(fields: Fields) -> None:
        if not is_current(fields, facts.fingerprint, facts.windows_fingerprint, facts.max_passage_tokens):
            raise StaleEncodingError

    try:
        fields, _ = read_string(value, check)
    except StaleEncodingError:
        return "stale"
    except CorruptEncodingError:
        return "corrupt"
    return str(fields["th"])


def _status(worth: str | Status, key: str) -> Status:
    """Return what a value is to a text with a key."""
    if worth in ("missing", "stale", "corrupt"):
        return worth
    return "stored" if worth == key else "stale"
