"""Values that go in and out of a reranker. Without torch."""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from kalm_integrations.errors import SettingsError

if TYPE_CHECKING:
    from kalm_integrations.core.passages.encoding import EncodedPassage

ENCODING_KEY = "kalm_encoding"
"""Metadata key of a passage's encoding."""
FINGERPRINT_KEY = "kalm_fp"
"""Metadata key of the encoding's fingerprint, short, for stores to filter on. Readers trust the one in the encoding only."""
FUSED_SCORE_KEY = "fused_score"
"""Metadata key under which adapters return the value that a fused ranking is ordered by."""

FusionMethod: TypeAlias = Literal["z_score", "reciprocal_rank"]
"""How the reranker's and the first stage's scores are made one; see `core.ranking.fuse`."""

Status: TypeAlias = Literal["stored", "cached", "found", "missing", "stale", "corrupt"]
"""What was found of a passage's encoding.

* stored: it came with the passage (or the passage is an `EncodedPassage`), and is valid.
* cached: none came with the passage, but memory has it.
* found: none came with the passage, but the payload store has one of its text; memory may have it by now.
* missing: there is none.
* stale: what came is of another checkpoint, setting or text.
* corrupt: what came is no encoding, or a damaged one.
"""


@dataclass(frozen=True)
class Passage:
    """A passage's text, with the metadata string of its encoding if the store had one."""

    text: str
    encoding: str | None = field(default=None, repr=False)
    origin: Hashable | None = field(default=None, repr=False, compare=False)
    """Where encodings of such passages are fetched from. A valid one is kept in memory for the same text of the same origin,
    for the times when it comes without."""


AnyPassage: TypeAlias = "str | EncodedPassage | Passage"
"""What can be scored: a text, an encoding, or a text with its stored encoding."""


@dataclass(frozen=True, eq=False, repr=False)
class Reading(Sequence[Status]):
    """What a reranker found out about the encodings of passages, before anything is encoded: a `Status` for each passage.

    `KalmReranker.read` makes it, and `rank` takes it in place of the passages, so that no encoding is read twice.
    """

    statuses: tuple[Status, ...]
    """Of each passage."""
    texts: tuple[str | None, ...]
    """Of each passage; None for an `EncodedPassage`."""
    keys: tuple[Hashable, ...]
    """What identifies each passage's encoding: passages with the same text share one."""
    encodings: Mapping[Hashable, Any]
    """The encodings that were found, by key."""
    read_by: str
    """Fingerprint and ratio of the reranker, for which the encodings are."""
    tally: Mapping[str, int]
    """Increments of `RuntimeStats`, counted when the reading is used."""

    @property
    def counts(self) -> dict[Status, int]:
        """How many passages have which status."""
        return {status: self.statuses.count(status) for status in get_args(Status)}

    @property
    def not_stored(self) -> list[int]:
        """Indices of the passages that came without a valid encoding of their own."""
        return [index for index, status in enumerate(self.statuses) if status != "stored"]

    @property
    def unencoded(self) -> dict[Hashable, str]:
        """Texts to encode, by key: nothing that was found serves them."""
        pairs = zip(self.keys, self.texts, strict=True)
        return {key: text for key, text in pairs if text is not None and key not in self.encodings}

    def part(self, start: int, stop: int) -> Reading:
        """Return the reading of some of the passages; nothing is counted a second time by it."""
        rows = slice(start, stop)
        return Reading(self.statuses[rows], self.texts[rows], self.keys[rows], self.encodings, self.read_by, {})

    def without_encodings(self) -> Reading:
        """Return what was found out without what was found."""
        return replace(self, encodings={}, tally={})

    def to_dict(self) -> dict[str, Any]:
        """Return the statuses and their counts, for JSON."""
        return {"statuses": list(self.statuses), "counts": self.counts}

    def __getitem__(self, index: Any) -> Any:
        """Return the status of a passage."""
        return self.statuses[index]

    def __len__(self) -> int:
        """Return the number of passages."""
        return len(self.statuses)

    def __repr__(self) -> str:
        """Return the counts."""
        found = ", ".join(f"{count} {status}" for status, count in self.counts.items() if count)
        return f"Reading({found or 'no passages'})"


@dataclass(frozen=True)
class Span:
    """A part of a passage's text: a sentence, or a window where the text has no sentences."""

    start: int
    """Of its first character, in code points."""
    end: int
    """Of the character behind its last one."""
    score: float
    """P(yes), between 0 and 1, of the passage if it said no more than this."""

    def to_dict(self) -> dict[str, int | float]:
        """Return the fields, for JSON."""
        return {"start": self.start, "end": self.end, "score": self.score}


@dataclass(frozen=True)
class RankedPassage:
    """A passage's place in a ranking."""

    index: int
    """Position in the passages that were given."""
    score: float
    """P(yes), between 0 and 1; NaN in a ranking that was not reranked."""
    margin: float
    """logit(yes) - logit(no): the score before the sigmoid, which keeps apart what rounds to the same score. NaN as above."""
    fused: float | None = None
    """What the ranking is ordered by if it is fused with the first stage's; comparable within one query only."""
    text: str | None = field(default=None, compare=False)
    """The passage's text, if one was given."""
    spans: tuple[Span, ...] | None = field(default=None, compare=False)
    """Its sentences, best first, if they were asked for: those of its best window, if it was read in windows. What was not
    read is in none of them."""
    window: tuple[int, int] | None = field(default=None, compare=False)
    """Where in its text the window lies that has the highest margin: first character, and the one behind the last. None where
    the passage was read in one piece."""

    @property
    def is_scored(self) -> bool:
        """Whether the passage was reranked."""
        return not math.isnan(self.margin)

    def __repr__(self) -> str:
        """Return the fields, a long text cut."""
        fused = "" if self.fused is None else f", fused={self.fused!r}"
        text = "" if self.text is None else f", text={_SHORT.repr(self.text)}"
        return f"RankedPassage(index={self.index}, score={self.score!r}, margin={self.margin!r}{fused}{text})"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON, which has no NaN; `spans` and `window` only if there are some."""
        fields = asdict(self)
        for name in ("spans", "window"):
            if fields[name] is None:
                del fields[name]
        return {name: None if value != value else value for name, value in fields.items()}


_SHORT = reprlib.Repr()
_SHORT.maxstring = 80

Metadata: TypeAlias = dict[str, str]
"""What a host stores with a passage: its `kalm_encoding` and `kalm_fp`."""


class Ranking(list[RankedPassage]):
    """Ranked passages, best first, with what the reranker learned about their encodings."""

    def __init__(
        self,
        passages: Iterable[RankedPassage],
        reading: Reading,
        encoded: Iterable[int] = (),
        write: Callable[[Sequence[int]], list[Metadata]] | None = None,
        *,
        reranked: bool = True,
    ) -> None:
        """Put a ranking together; `KalmReranker.rank` does.

        Args:
            passages: best first.
            reading: of all passages that were given, also those that were cut off.
            encoded: indices of the passages that had to be encoded.
            write: returns the metadata of passages that are not stored, by their indices.
            reranked: False if this is the order in which the passages came, unscored: the reranker failed or was late.
        """
        super().__init__(passages)
        self.reranked = reranked
        self.reading = reading.without_encodings()
        self._encoded = tuple(encoded)
        self._write = write
        self._made: dict[int, Metadata] | None = None

    @property
    def made(self) -> dict[int, Metadata]:
        """The metadata to store of every passage that had to be encoded for this ranking, by its input index.

        It is written when it is first asked for; in reference mode the payloads go into the payload store then.
        """
        if self._made is None:
            self._made = self.to_metadata(self._encoded)
        return self._made

    @property
    def counts(self) -> dict[Status, int]:
        """How many of the passages that were given had which status; see `Reading`."""
        return self.reading.counts

    def to_metadata(self, indices: Sequence[int]) -> dict[int, Metadata]:
        """Return the metadata to store of passages that are not stored, by index; nothing is encoded for it."""
        if not indices or self._write is None:
            return {}
        return dict(zip(indices, self._write(indices), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Return the ranked passages, whether they were reranked, and the counts, for JSON."""
        return {"results": [passage.to_dict() for passage in self], "reranked": self.reranked, "counts": self.counts}

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel with what was made instead of the means to make it."""
        return _restore_ranking, (list(self), self.reading, self.made, self.reranked)


def _restore_ranking(passages: list[RankedPassage], reading: Reading, made: dict[int, Metadata], reranked: bool) -> Ranking:
    return Ranking(passages, reading, made, lambda indices: [made[index] for index in indices], reranked=reranked)


@dataclass(frozen=True)
class RuntimeStats:
    """What a reranker has done since it was made. Counts are of passages, duplicates within a call counted once."""

    passages_encoded: int = 0
    cache_hits: int = 0
    """Served without encoding: from metadata, from memory, or from the payload store by text."""
    metadata_hits: int = 0
    """Served from the encoding that came with the passage; part of `cache_hits`."""
    store_hits: int = 0
    """Came without a valid encoding, and were found in the payload store by their text; part of `cache_hits`."""
    cache_misses: int = 0
    """Had to be encoded; stale and corrupt ones included."""
    stale: int = 0
    """Came with an encoding of another checkpoint, setting or text."""
    corrupt: int = 0
    """Came with something that is not an encoding, or a damaged one."""
    coarser: int = 0
    """Came with an encoding coarser than `compression_ratio`, and were scored at its ratio."""
    truncated: int = 0
    """Not read to the end when encoded: longer than `max_passage_tokens`, or than `max_windows` windows."""
    windowed: int = 0
    """Encoded in several windows."""
    passages_scored: int = 0
    prefix_hits: int = 0
    """Scored from prefix states in memory: the decoder read only the query's own tokens."""
    prefix_store_hits: int = 0
    """Scored from prefix states in the `prefix_store`."""
    prefix_misses: int = 0
    """Prefix states had to be computed."""
    prefix_corrupt: int = 0
    """Prefix states in the `prefix_store` were damaged, or another passage's; part of `prefix_misses`."""
    store_writes: int = 0
    """Encodings that `write_through` has put into the payload store."""
    store_evictions: int = 0
    """Encodings that were deleted from the payload store to keep to `max_store_bytes`."""
    store_failures: int = 0
    """Calls of a payload or prefix store that failed or were slow; what they should have given was computed."""
    encode_seconds: float = 0.0
    score_seconds: float = 0.0

    def to_dict(self) -> dict[str, int | float]:
        """Return the counters, for JSON."""
        return asdict(self)


def iterator_of(values: Any) -> Iterator[Any] | None:
    """Return an iterator over values, or None where they are none."""
    try:
        # Arrays and tensors without a dimension are iterable by their class, and say only here that they are not.
        return iter(values) if isinstance(values, Iterable) else None
    except TypeError:
        return None


def checked_list(values: Iterable[Any], name: str) -> list[Any]:
    """Return the values as a list: an iterator is gone through once only, and what it makes must outlive the call.

    Raises:
        SettingsError: it is one text or passage, or not iterable.
    """
    # A mapping would give its keys.
    iterator = None if isinstance(values, (str, bytes, Passage, Mapping)) else iterator_of(values)
    if iterator is None:
        remedy = f"give [] for no {name}" if values is None else "put it into a list"
        msg = f"{name} must be a list, but got one {type(values).__name__}; {remedy}"
        raise SettingsError(msg)
    return list(iterator)


def checked_texts(texts: Iterable[Any]) -> list[str]:
    """Return texts as a list of plain strings.

    Raises:
        SettingsError: it is one string, not iterable, or holds something else than strings.
    """
    checked = [plain(text) for text in checked_list(texts, "texts")]
    for text in checked:
        if not isinstance(text, str):
            msg = f"texts must be strings, but got {type(text).__name__}"
            raise SettingsError(msg)
    return checked


def checked_flag(value: object, name: str) -> bool:
    """Return a switch as a bool; whatever is true or false will do.

    Raises:
        SettingsError: it is neither, as an array of several values.
    """
    try:
        return bool(value)
    except Exception as error:
        msg = f"{name} must be True or False, but got {type(value).__name__}, which is neither ({error})"
        raise SettingsError(msg) from error


def plain(value: Any) -> Any:
    """Return a text as a str and a whole number as an int, of whatever kind they are; anything else as it is.

    An enum's member or numpy's string is the text that it holds, however it prints, compares or hashes itself.
    """
    if isinstance(value, str):
        return str.__str__(value)
    if value is None or isinstance(value, bool):
        return value
    try:
        return operator.index(value)
    except Exception:
        return value


def as_number(value: Any) -> float:
    """Return a number as a float, numpy's and torch's scalars too; NaN where it is none, or too large for a float."""
    if isinstance(value, (str, bytes, bytearray, memoryview, bool)):
        return math.nan
    try:
        return float(value)
    except Exception:
        return math.nan


def shown(value: object) -> str:
    """Return a value for a message: its repr, cut where it is long; its type where it has no repr, as a huge int."""
    try:
        text = repr(value)
    except Exception:
        return f"a {type(value).__name__}"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


_MAX_SHOWN = 200
