"""A reranker without a model, for the tests of applications that rerank."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace

from kalm_integrations.core.base import RankRequest, Reranker
from kalm_integrations.core.ranking import RankRules, sigmoid
from kalm_integrations.core.sentences import divide
from kalm_integrations.core.types import (
    ENCODING_KEY,
    FINGERPRINT_KEY,
    AnyPassage,
    Metadata,
    Passage,
    Ranking,
    Reading,
    RuntimeStats,
    Span,
    Status,
    checked_list,
    checked_texts,
    plain,
)
from kalm_integrations.errors import SettingsError


class FakeReranker(Reranker):
    """Scores by the share of the query's words that a passage or a sentence has, and counts encodes as a real reranker does.

    Deterministic and without torch. Its encodings are strings that only a fake of the same `name` accepts, so that a test can
    play through stale and corrupt metadata.
    """

    def __init__(self, name: str = "fake") -> None:
        """Make a fake; another `name` stands for another checkpoint."""
        self._fingerprint = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
        self._stats = RuntimeStats()

    @property
    def fingerprint(self) -> str:
        """What its encodings carry."""
        return self._fingerprint

    @property
    def stats(self) -> RuntimeStats:
        """A snapshot of the counters."""
        return self._stats

    def warm_up(self, *, encoder: bool = True, decoder: bool = True) -> None:
        """Do nothing: there are no weights."""

    def encode_to_metadata(self, texts: Iterable[str], show_progress: bool = False) -> list[Metadata]:
        """Return metadata with a fake encoding for each text; duplicates are counted once."""
        del show_progress
        texts = checked_texts(texts)
        self._count(passages_encoded=len(set(texts)))
        return self._metadata(texts)

    def read(self, passages: Iterable[AnyPassage]) -> Reading:
        """Return a status for each passage; a fake has no cache."""
        given = [_to_passage(passage) for passage in checked_list(passages, "passages")]
        statuses = tuple(map(self._status, given))
        texts = tuple(passage.text for passage in given)
        rows = set(zip(statuses, texts, strict=True))
        found: dict[Hashable, str] = {text: self._encoding(text) for status, text in rows if status == "stored"}
        tally: Counter[str] = Counter(status for status, _ in rows)
        return Reading(statuses, texts, texts, found, self.fingerprint, tally)

    def answer(self, request: RankRequest) -> list[Ranking]:
        """Return the ranking of each query's passages by the words that they share."""
        readings = [given if isinstance(given, Reading) else self.read(given) for given in request.lists]
        rows = zip(request.queries, readings, request.first_stages, strict=True)
        return [self._rank_reading(*row, request.rules, request.spans) for row in rows]

    def _rank_reading(
        self, query: str, reading: Reading, first_stage: list[float] | None, rules: RankRules, n_spans: int | None
    ) -> Ranking:
        missing, n_stored = set(reading.unencoded), reading.tally.get("stored", 0)
        self._count(
            passages_encoded=len(missing),
            cache_misses=len(missing),
            cache_hits=n_stored,
            metadata_hits=n_stored,
            stale=reading.tally.get("stale", 0),
            corrupt=reading.tally.get("corrupt", 0),
            passages_scored=len(set(reading.keys)),
        )
        texts = [text or "" for text in reading.texts]
        margins = self._margins(query, texts)
        ranked = rules.apply(margins, [sigmoid(margin) for margin in margins], texts, first_stage)
        for rank in range(min(n_spans or 0, len(ranked))):
            ranked[rank] = replace(ranked[rank], spans=self._spans(query, texts[ranked[rank].index]))
        encoded = [index for index in reading.not_stored if texts[index] in missing]
        return Ranking(ranked, reading, encoded, lambda indices: self._metadata([texts[index] for index in indices]))

    def _margins(self, query: str, texts: Sequence[str]) -> list[float]:
        words = set(_words(query))
        return [8 * len(words & set(_words(text))) / max(len(words), 1) - 4 for text in texts]

    def _spans(self, query: str, text: str) -> tuple[Span, ...]:
        # One character for one, so that places stay.
        text = _SURROGATE.sub("\ufffd", text)
        ranges = divide(text, [token.span() for token in _TOKEN.finditer(text)])
        margins = self._margins(query, [text[start:end] for start, end in ranges])
        spans = [Span(*place, sigmoid(margin)) for place, margin in zip(ranges, margins, strict=True)]
        return tuple(sorted(spans, key=lambda span: -span.score))

    def _status(self, passage: Passage) -> Status:
        encoding = passage.encoding
        if encoding is None:
            return "missing"
        # Metadata may hold anything; an array would compare its items.
        if not isinstance(encoding, str) or not encoding.startswith("kalm1."):
            return "corrupt"
        return "stored" if encoding == self._encoding(passage.text) else "stale"

    def _metadata(self, texts: Sequence[str]) -> list[Metadata]:
        return [{ENCODING_KEY: self._encoding(text), FINGERPRINT_KEY: self.fingerprint} for text in texts]

    def _encoding(self, text: str) -> str:
        return f"kalm1.{self.fingerprint}.{hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}"

    def _count(self, **increments: int) -> None:
        counted = {name: getattr(self._stats, name) + n for name, n in increments.items()}
        self._stats = replace(self._stats, **counted)


def _to_passage(passage: AnyPassage) -> Passage:
    given = passage if isinstance(passage, Passage) else Passage(plain(passage))
    if isinstance(given.text, str):
        return Passage(plain(given.text), plain(given.encoding))
    got = f"a Passage of {type(given.text).__name__}" if isinstance(passage, Passage) else type(passage).__name__
    msg = f"a fake scores str and Passage (of str), but got {got}; it cannot read states"
    raise SettingsError(msg)


_TOKEN = re.compile(r"\w+|[^\w\s]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
