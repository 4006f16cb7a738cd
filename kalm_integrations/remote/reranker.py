"""RemoteReranker: what a reranker offers, answered by a service."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from kalm_integrations.core.base import RankRequest, Reranker
from kalm_integrations.core.fallback import check_timeout, too_late
from kalm_integrations.core.forks import ForkSafeLock
from kalm_integrations.core.ranking import RankRules
from kalm_integrations.core.text import Range, ranges_in, without_surrogates
from kalm_integrations.core.types import (
    ENCODING_KEY,
    FINGERPRINT_KEY,
    AnyPassage,
    Metadata,
    RankedPassage,
    Ranking,
    Reading,
    RuntimeStats,
    checked_flag,
    checked_list,
    checked_texts,
    plain,
    shown,
)
from kalm_integrations.errors import ServiceError, SettingsError
from kalm_integrations.remote.address import check_address, check_key
from kalm_integrations.remote.connections import AnyTransport, Connections
from kalm_integrations.remote.conversation import Aside, Call, Conversation, Deadline, ask, not_ours
from kalm_integrations.remote.protocol import ENCODINGS_PATH, FACTS_PATH, EncodingsAnswer, EncodingsRequest, ServiceFacts
from kalm_integrations.remote.reading import Reader, name_of
from kalm_integrations.remote.scoring import OtherModelError, Query, Scored, Service, slices

TEXTS_PER_REQUEST = 64
CHARACTERS_PER_REQUEST = 2**20
"""Of texts that are encoded by one request: what may have to be done again, and what a service does in time."""
MAX_ENCODINGS_BYTES = 2**30
"""Of the answer."""


class RemoteReranker(Reranker):
    """Scores passages by a service that `kalm serve` runs, with its model, its settings and its store of encodings.

    Texts are sent. Encodings that came with documents are sent only if the service has none of its own. All methods may be
    called from any thread and any event loop. A copy is the same reranker; a pickle connects anew, and takes its key from the
    environment.

    ```python
    reranker = RemoteReranker("http://127.0.0.1:8080")
    reranker.rank("who won?", passages, top_k=3, timeout=2)
    ```
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float | None = 300.0,
        max_retries: int = 3,
        transport: AnyTransport | None = None,
    ) -> None:
        """Check and keep the settings; nothing is connected.

        Args:
            url: the service's address; a path may follow, if a proxy puts one before it.
            api_key: what the service asks for; None takes the environment variable `KALM_API_KEY`, if it is set.
            timeout: seconds for a request to the service, where a call has no time-out of its own; None waits as long as it
                takes. The time-out of `rank` bounds all that belongs to a query, waiting and asking again included.
            max_retries: how often a request is sent again that the service was too busy or not ready for, or that did not
                reach it.
            transport: an httpx transport (a proxy, certificates, a test) for threads, for coroutines of one event loop, or for
                both.

        Raises:
            SettingsError: one breaks a rule.
        """
        retries = plain(max_retries)
        if type(retries) is not int or retries < 0:
            msg = f"max_retries must be a whole number from 0, but got {shown(max_retries)}"
            raise SettingsError(msg)
        self._to = Service(check_address(url), uuid.uuid4().hex, check_timeout(timeout), retries)
        self._connections = Connections(self._to.url, check_key(api_key), transport)
        self._transport = transport
        self._reader = Reader()
        self._facts: ServiceFacts | None = None
        self._stats = RuntimeStats()
        self._stats_lock = ForkSafeLock()

    @property
    def url(self) -> str:
        """The service's address."""
        return self._to.url

    @property
    def model_name(self) -> str:
        """The service's model; its address as long as it was not asked."""
        return self._to.url if self._facts is None else self._facts.model

    @property
    def fingerprint(self) -> str:
        """What makes the service's encodings: checkpoint content, tokenizer, template and encoder settings.

        Raises:
            EngineError: the service was not asked yet, and cannot be.
        """
        return self._known().fingerprint

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """All that the service's encodings may carry; see `Reranker`.

        Raises:
            EngineError: the service was not asked yet, and cannot be.
        """
        return self._known().fingerprints

    @property
    def compression_ratio(self) -> int:
        """Encoder tokens per state of the service's encodings."""
        return self._known().compression_ratio

    @property
    def storage_codec(self) -> str:
        """How the service writes states."""
        return self._known().storage_codec

    @property
    def stats(self) -> RuntimeStats:
        """A snapshot of the counters: what the service did for this reranker, as far as it tells."""
        return self._stats

    def warm_up(self, *, encoder: bool = True, decoder: bool = True) -> None:
        """Ask the service once, so that a wrong address or key is found now; it has loaded its weights itself.

        Raises:
            SettingsError: the service refuses the key, or is none.
            EngineError: it cannot be reached, or is not ready.
        """
        del encoder, decoder
        self._connections.run(self._renew(None))

    def get_ready(self, timeout: float | None = None) -> None:
        """Ask the service for its fingerprint, if that is not known yet.

        Raises:
            EngineError: it does not answer in time, or at all.
        """
        self._connections.run(self._meet(self._to.deadline(timeout)))

    def encode_to_metadata(self, texts: Iterable[str], show_progress: bool = False) -> list[Metadata]:
        """Have passages encoded, and return for each, in order, `kalm_encoding` and `kalm_fp`; duplicates are sent once.

        Raises:
            SettingsError: `texts` is one string, or holds something else than strings; or the service refuses them.
            EngineError: the service does not answer in time, or at all.
        """
        return self._connections.run(self._encode(texts, show_progress))

    async def aencode_to_metadata(self, texts: Iterable[str], show_progress: bool = False) -> list[Metadata]:
        """Do what `encode_to_metadata` does; no thread waits, and what is left is not sent if the coroutine is cancelled."""
        return await self._connections.arun(self._encode(texts, show_progress))

    def read(self, passages: Iterable[AnyPassage]) -> Reading:
        """Return what each passage's metadata are worth; "cached" are texts that the service had before.

        This is found out here, by the strings; the service is asked for its fingerprint once.

        Raises:
            SettingsError: a passage is neither a text nor a `Passage`.
            EngineError: the service was not asked yet, and cannot be.
        """
        return self._connections.run(self._read(checked_list(passages, "passages"), None))

    async def aread(self, passages: Iterable[AnyPassage]) -> Reading:
        """Do what `read` does, off the event loop."""
        return await self._connections.arun(self._read(checked_list(passages, "passages"), None))

    def answer(self, request: RankRequest) -> list[Ranking]:
        """See `Reranker`."""
        return self._connections.run(self._answer(request))

    async def aanswer(self, request: RankRequest) -> list[Ranking]:
        """See `Reranker`: no thread waits, and a coroutine that is cancelled hangs up."""
        answering = asyncio.ensure_future(self._connections.arun(self._answer(request)))
        try:
            return await asyncio.wait_for(answering, request.timeout)
        except asyncio.TimeoutError as error:
            if not answering.cancelled():
                raise  # an error of the conversation's own
            raise too_late(request.timeout) from error

    def _known(self) -> ServiceFacts:
        return self._facts or self._connections.run(self._meet(None))

    def _meet(self, deadline: Deadline | None) -> Conversation[ServiceFacts]:
        """Return what is known of the service."""
        return self._facts or (yield from self._renew(deadline))

    def _renew(self, deadline: Deadline | None) -> Conversation[ServiceFacts]:
        """Ask what the service is."""
        call = Call(FACTS_PATH, ServiceFacts)
        facts = yield from ask(call, self._to.url, deadline or self._to.deadline(), self._to.max_retries)
        if self._facts is not None and name_of(facts) != name_of(self._facts):
            self._reader.forget()
        self._facts = facts
        return facts

    def _read(self, passages: Sequence[Any], deadline: Deadline | None) -> Conversation[Reading]:
        if not passages:
            # Nothing to read asks nobody.
            return Reading((), (), (), {}, "", {})
        facts = yield from self._meet(deadline)
        reading: Reading = yield Aside(lambda: self._reader.read(passages, facts))
        return reading

    def _answer(self, request: RankRequest) -> Conversation[list[Ranking]]:
        deadline = None if request.timeout is None else Deadline.after(request.timeout)
        rankings = []
        for query, given, first_stage in zip(request.queries, request.lists, request.first_stages, strict=True):
            started = time.perf_counter()
            reading, scored, ranked = yield from self._rank(query, given, first_stage, request, deadline)
            self._count_scored(reading, scored, time.perf_counter() - started)
            rankings.append(self._ranking(reading, scored, ranked))
        return rankings

    def _rank(
        self, query: str, given: Any, first_stage: list[float] | None, request: RankRequest, deadline: Deadline | None
    ) -> Conversation[tuple[Reading, Scored, list[RankedPassage]]]:
        """Return the reading of passages, what the service says of them, and their order.

        Should the service get another model or read long passages in another way meanwhile, all is done anew.
        """
        is_read = isinstance(given, Reading)
        for is_last in (is_read, True):
            reading = given if is_read else (yield from self._read(given, deadline))
            if not reading:
                return reading, Scored(), []
            facts = yield from self._meet(deadline)
            if request.spans is not None and not facts.spans:
                facts = yield from self._renew(deadline)
                _check_spans(facts, self._to.url)
            if reading.read_by != name_of(facts):
                if not is_last:
                    continue
                msg = (
                    f"a reading must be of the service's model and ratio, {name_of(facts)}, but is of {reading.read_by}; read "
                    "the passages again"
                )
                raise ServiceError(msg)
            asked: Query = yield Aside(partial(Query.of, self._to, facts.fingerprints, query, request.instruction, reading))
            try:
                scored = yield from asked.score(deadline)
                ranked = _apply(request.rules, reading, scored, first_stage)
                if best := ranked[: request.spans or 0]:
                    best_keys = [reading.keys[passage.index] for passage in best]
                    ranked[: len(best)] = yield from asked.with_spans(best, best_keys, deadline)
            except OtherModelError:
                yield from self._renew(deadline)
                if is_last:
                    raise
            else:
                return reading, scored, ranked
        raise AssertionError  # the last turn returns or raises

    def _ranking(self, reading: Reading, scored: Scored, ranked: list[RankedPassage]) -> Ranking:
        keys = reading.keys
        statuses = tuple(scored.status(key, status) for key, status in zip(keys, reading.statuses, strict=True))
        told = replace(reading, statuses=statuses)
        made = scored.encoded
        texts = reading.texts

        def write(indices: Sequence[int]) -> list[Metadata]:
            return self._connections.run(self._written([texts[index] or "" for index in indices], None))

        return Ranking(ranked, told, [index for index in told.not_stored if keys[index] in made], write)

    def _encode(self, texts: Iterable[str], show_progress: bool) -> Conversation[list[Metadata]]:
        texts = checked_texts(texts)
        unique = len(set(texts))
        with tqdm(
            total=unique, desc="Encoding", unit="passage", disable=not checked_flag(show_progress, "show_progress")
        ) as bar:
            started = time.perf_counter()
            written = yield from self._written(texts, bar)
        self._count(passages_encoded=unique, encode_seconds=time.perf_counter() - started)
        return written

    def _written(self, texts: Sequence[str], progress: Any) -> Conversation[list[Metadata]]:
        """Return what the service says is to be stored with texts."""
        sent = {text: without_surrogates(text) for text in texts}
        made: dict[str, Metadata] = {}
        sized = ((text, len(text)) for text in dict.fromkeys(sent.values()))
        for part in slices(sized, TEXTS_PER_REQUEST, CHARACTERS_PER_REQUEST):
            call = Call(ENCODINGS_PATH, EncodingsAnswer, EncodingsRequest(texts=part), MAX_ENCODINGS_BYTES)
            answer = yield from ask(call, self._to.url, self._to.deadline(), self._to.max_retries)
            if len(answer.encodings) != len(part):
                raise not_ours(self._to.url, f"sent {len(answer.encodings)} encodings for {len(part)} texts")
            if not all({ENCODING_KEY, FINGERPRINT_KEY} == encoding.keys() for encoding in answer.encodings):
                raise not_ours(self._to.url, f"sent encodings that are not {ENCODING_KEY} and {FINGERPRINT_KEY}")
            made.update(zip(part, answer.encodings, strict=True))
            if progress is not None:
                progress.update(len(part))
        return [dict(made[sent[text]]) for text in texts]

    def _count_scored(self, reading: Reading, scored: Scored, seconds: float) -> None:
        self._reader.note_scored([key for key in scored.statuses if key not in scored.sent])
        made = scored.encoded
        refused = Counter(scored.statuses[key] for key in scored.sent & made)
        self._count(
            passages_encoded=len(made),
            cache_misses=len(made),
            cache_hits=len(scored.statuses) - len(made),
            store_hits=sum(status == "found" for status in scored.statuses.values()),
            metadata_hits=reading.tally.get("metadata_hits", 0) - refused.total(),
            stale=reading.tally.get("stale", 0) + refused["stale"],
            corrupt=reading.tally.get("corrupt", 0) + refused["corrupt"],
            passages_scored=len(scored.statuses),
            score_seconds=seconds,
        )

    def _count(self, **increments: float) -> None:
        with self._stats_lock:
            counted = {name: getattr(self._stats, name) + n for name, n in increments.items()}
            self._stats = replace(self._stats, **counted)

    def __repr__(self) -> str:
        """Return the address; the key is not shown."""
        return f"RemoteReranker({self._to.url!r})"

    def __copy__(self) -> RemoteReranker:
        """Return the reranker itself: it has nothing to change, and its connections serve both."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteReranker:
        """Return the reranker itself; see `__copy__`."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as the address, to be connected anew; a key stays here.

        Raises:
            SettingsError: a transport lives in this process only.
        """
        if self._transport is not None:
            msg = "a RemoteReranker must have no transport to go to another process, but has one; make it there"
            raise SettingsError(msg)
        return _reopen, (self._to.url, self._to.timeout, self._to.max_retries)


def _apply(rules: RankRules, reading: Reading, scored: Scored, first_stage: list[float] | None) -> list[RankedPassage]:
    """Return passages in the order that a service's scores give them."""
    keys = reading.keys
    margins, scores = [scored.margins[key] for key in keys], [scored.scores[key] for key in keys]
    ranked = rules.apply(margins, scores, reading.texts, first_stage)
    return [_with_window(passage, scored.windows.get(keys[passage.index])) for passage in ranked]


def _with_window(passage: RankedPassage, window: Range | None) -> RankedPassage:
    """Return a passage with the place of its best window, if it has several."""
    if window is None:
        return passage
    [place] = ranges_in(passage.text or "", [window])
    return replace(passage, window=place)


def _check_spans(facts: ServiceFacts, url: str) -> None:
    """Check that a service scores sentences.

    Raises:
        SettingsError: it is older than that.
    """
    if not facts.spans:
        msg = (
            f"spans need a service that scores sentences, but the one at {url} is older than that (version {facts.version}); "
            "upgrade kalm-integrations there and start it anew, or ask without spans"
        )
        raise SettingsError(msg)


def _reopen(url: str, timeout: float | None, max_retries: int) -> RemoteReranker:
    return RemoteReranker(url, timeout=timeout, max_retries=max_retries)
