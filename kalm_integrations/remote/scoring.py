"""One query: texts first, then those encodings that the service lacks, in requests of a size that it takes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from kalm_integrations.core.text import Range, ranges_in, without_surrogates
from kalm_integrations.core.types import RankedPassage, Reading, Span, Status
from kalm_integrations.errors import ServiceError
from kalm_integrations.remote.conversation import Call, Conversation, Deadline, ask, not_ours
from kalm_integrations.remote.protocol import SCORE_PATH, ScoreAnswer, ScoreRequest, SentPassage, SentSpan, name_encoding

MAX_PASSAGES = 1000
"""Passages of a request; the service takes no more."""
MAX_CHARACTERS = 4 * 2**20
"""Of texts and encodings in a request; each is at most six bytes of JSON, and the service takes 32 MiB."""

MAX_SPANS_BYTES = 2**27
"""Of an answer with spans, of which a request's characters may make two million."""

_MARK = 100
"""Characters that stand around a passage in JSON."""

Item = TypeVar("Item")


class OtherModelError(ServiceError):
    """The service has another model, or reads long passages in another way, than the one for which passages were read."""


@dataclass(frozen=True)
class Service:
    """Whom to ask, and how."""

    url: str
    client: str
    """A random name, under which the service keeps what it is sent."""
    timeout: float | None
    """Seconds for a request, where a call has no time-out of its own."""
    max_retries: int

    def deadline(self, timeout: float | None = None) -> Deadline:
        """Begin to count."""
        return Deadline.after(self.timeout if timeout is None else timeout)


@dataclass
class Scored:
    """What a service said of passages, by key."""

    margins: dict[Hashable, float] = field(default_factory=dict)
    scores: dict[Hashable, float] = field(default_factory=dict)
    statuses: dict[Hashable, Status] = field(default_factory=dict)
    """What it had of each."""
    sent: set[Hashable] = field(default_factory=set)
    """Whose encoding was sent."""
    spans: dict[Hashable, list[SentSpan]] = field(default_factory=dict)
    """Those of the texts as they were sent, if they were asked for."""
    windows: dict[Hashable, Range] = field(default_factory=dict)
    """The best ones of texts that were read in several, in the texts as they were sent."""

    def status(self, key: Hashable, read: Status) -> Status:
        """Return a passage's status: what its metadata are worth, if there are any, or else what the service had.

        Args:
            key: the passage's.
            read: its status as it was read here. The service looks deeper into what it is sent.
        """
        said = self.statuses[key]
        if read in ("stale", "corrupt"):
            return read
        if read == "stored":
            return said if key in self.sent and said in ("stale", "corrupt") else "stored"
        # The encoding came with another passage of the same text, or is remembered.
        return read if said == "stored" else said

    @property
    def encoded(self) -> set[Hashable]:
        """What the service had to encode."""
        return {key for key, status in self.statuses.items() if status in ("missing", "stale", "corrupt")}


@dataclass(frozen=True)
class Query:
    """A query, and its passages by key: one for each text."""

    to: Service
    fingerprints: tuple[str, ...]
    """For which the passages were read."""
    query: str
    instruction: str | None
    texts: Mapping[Hashable, str]
    encodings: Mapping[Hashable, str]
    """Those that may be sent."""
    names: Mapping[Hashable, str]
    """Of the encodings."""
    spans: bool = False
    """Whether the spans of the passages are asked for too."""

    @classmethod
    def of(cls, to: Service, fingerprints: tuple[str, ...], query: str, instruction: str | None, reading: Reading) -> Query:
        """Take what has been read."""
        texts = {key: without_surrogates(text or "") for key, text in zip(reading.keys, reading.texts, strict=True)}
        # What fills a request alone is made anew instead.
        encodings = {key: value for key, value in reading.encodings.items() if len(value) <= MAX_CHARACTERS // 2}
        plain_instruction = None if instruction is None else without_surrogates(instruction)
        names = {key: name_encoding(value) for key, value in encodings.items()}
        return cls(to, fingerprints, without_surrogates(query), plain_instruction, texts, encodings, names)

    def score(self, deadline: Deadline | None) -> Conversation[Scored]:
        """Return what the service says of all passages.

        Raises:
            OtherModelError: it has another model.
        """
        scored = Scored()
        for keys in self._slices(self.texts, frozenset()):
            yield from self._ask(keys, frozenset(), scored, deadline)
        return scored

    def with_spans(
        self, ranked: Sequence[RankedPassage], keys: Sequence[Hashable], deadline: Deadline | None
    ) -> Conversation[list[RankedPassage]]:
        """Return passages with their spans.

        Args:
            ranked: the passages, each with its text.
            keys: of each.
            deadline: of the answer.

        Raises:
            OtherModelError: the service has another model.
        """
        asked = replace(self, texts={key: self.texts[key] for key in keys}, spans=True)
        scored = yield from asked.score(deadline)
        return [_with_spans(passage, scored.spans[key]) for passage, key in zip(ranked, keys, strict=True)]

    def _ask(
        self, keys: Sequence[Hashable], sent: frozenset[Hashable], scored: Scored, deadline: Deadline | None
    ) -> Conversation[None]:
        """Ask for scores; what the service wants of encodings is sent the second time, and all that it may want the third."""
        body = ScoreRequest(
            query=self.query,
            passages=[self._passage(key, sent) for key in keys],
            instruction=self.instruction,
            client=self.to.client,
            spans=self.spans,
        )
        call = Call(SCORE_PATH, ScoreAnswer, body, MAX_SPANS_BYTES) if self.spans else Call(SCORE_PATH, ScoreAnswer, body)
        answer = yield from ask(call, self.to.url, deadline or self.to.deadline(), self.to.max_retries)
        if answer.fingerprints != self.fingerprints:
            msg = (
                f"the service at {self.to.url} must keep its model, and its way to read long passages, during a query, but "
                "has another one now; ask again"
            )
            raise OtherModelError(msg)
        if not answer.wanted:
            self._take(keys, sent, answer, scored)
            return
        held = {index for index, key in enumerate(keys) if key in self.encodings and key not in sent}
        if not held.issuperset(answer.wanted):
            raise not_ours(self.to.url, "wants encodings that it was not offered")
        # Several machines may answer in turn, of which each wants others.
        wanted = self.encodings.keys() if sent else {keys[index] for index in answer.wanted}
        more = frozenset(key for key in keys if key in wanted)
        for part in self._slices(keys, more):
            yield from self._ask(part, more, scored, deadline)

    def _passage(self, key: Hashable, sent: frozenset[Hashable]) -> SentPassage:
        encoding = self.encodings[key] if key in sent else None
        return SentPassage(text=self.texts[key], held=self.names.get(key), encoding=encoding)

    def _take(self, keys: Sequence[Hashable], sent: Iterable[Hashable], answer: ScoreAnswer, scored: Scored) -> None:
        lengths = {len(values) for values in (answer.margins, answer.scores, answer.statuses)}
        if lengths != {len(keys)}:
            raise not_ours(self.to.url, f"sent {sorted(lengths)} values for {len(keys)} passages")
        scored.margins.update(zip(keys, answer.margins, strict=True))
        scored.scores.update(zip(keys, answer.scores, strict=True))
        scored.statuses.update(zip(keys, answer.statuses, strict=True))
        scored.sent.update(sent)
        if answer.windows:
            self._take_windows(keys, answer, scored)
        if self.spans:
            if len(answer.spans) != len(keys):
                raise not_ours(self.to.url, f"sent spans of {len(answer.spans)} passages for {len(keys)} passages")
            for key, spans in zip(keys, answer.spans, strict=True):
                if not all(span.start < span.end <= len(self.texts[key]) for span in spans):
                    raise not_ours(self.to.url, "sent spans that lie outside their texts")
                scored.spans[key] = spans

    def _take_windows(self, keys: Sequence[Hashable], answer: ScoreAnswer, scored: Scored) -> None:
        if len(answer.windows) != len(keys):
            raise not_ours(self.to.url, f"sent windows of {len(answer.windows)} passages for {len(keys)} passages")
        windows = {key: window for key, window in zip(keys, answer.windows, strict=True) if window is not None}
        # What somebody encoded for another text may have empty ones in this one.
        if not all(start <= end <= len(self.texts[key]) for key, (start, end) in windows.items()):
            raise not_ours(self.to.url, "sent windows that lie outside their texts")
        scored.windows.update(windows)

    def _slices(self, keys: Iterable[Hashable], sent: frozenset[Hashable]) -> Iterator[list[Hashable]]:
        def size(key: Hashable) -> int:
            return len(self.texts[key]) + (len(self.encodings[key]) if key in sent else 0)

        return slices([(key, size(key)) for key in keys], MAX_PASSAGES, MAX_CHARACTERS)


def _with_spans(passage: RankedPassage, spans: Sequence[SentSpan]) -> RankedPassage:
    """Return a passage with spans of its text as it was sent: without surrogates."""
    ranges = ranges_in(passage.text or "", [(span.start, span.end) for span in spans])
    return replace(passage, spans=tuple(Span(*place, span.score) for place, span in zip(ranges, spans, strict=True)))


def slices(sized: Iterable[tuple[Item, int]], max_items: int, max_characters: int) -> Iterator[list[Item]]:
    """Cut items into runs that make a request; one that is too long for it makes one of its own.

    Args:
        sized: items, each with its characters.
        max_items: of a run.
        max_characters: of a run.
    """
    run: list[Item] = []
    n_characters = 0
    for item, n_own in sized:
        n_more = n_own + _MARK
        if run and (len(run) == max_items or n_characters + n_more > max_characters):
            yield run
            run, n_characters = [], 0
        run.append(item)
        n_characters += n_more
    if run:
        yield run
