"""From queries and passages to rankings: read, encode what is missing, score, order."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from kalm_integrations.core.base import RankRequest, check_instruction, checked_passages
from kalm_integrations.core.flows import Flow, call_plainly
from kalm_integrations.core.jobs import Job, Work
from kalm_integrations.core.opening import Parts
from kalm_integrations.core.passages.encoding import EncodedPassage
from kalm_integrations.core.reading import Reader
from kalm_integrations.core.scoring import Margin, Scorer
from kalm_integrations.core.spans import Asked, Highlighter
from kalm_integrations.core.text import ranges_in, without_surrogates
from kalm_integrations.core.types import AnyPassage, Metadata, Passage, RankedPassage, Ranking, Reading, checked_flag
from kalm_integrations.core.writing import Writer
from kalm_integrations.errors import SettingsError

MAX_PASSAGES_AT_ONCE = 4096
"""Passages that are worked on at a time: what bounds the encodings in memory, beside the caches and the rankings."""

LIGHT_PASSAGES = 512
LIGHT_WEIGHT = 2**24
"""Characters of encodings whose reading is light: some 40 ms."""
CHARACTER_WEIGHT = 16
"""How many times longer than to read a character of an encoding it takes to tokenise one of a text."""


class Ranker:
    """Ranks passages for queries with the parts of a reranker."""

    def __init__(self, parts: Parts) -> None:
        """Make reader, writer and scorer of the parts."""
        self._runtime = parts.runtime
        query = parts.query
        self.reader = Reader(parts.runtime.checkpoint, parts.encoder, parts.storage, query.cache_bytes, parts.payload_store)
        self.writer = Writer(parts.runtime, self.reader, parts.encoder, parts.storage, query.encode_batch_size)
        allows_special = parts.encoder.allow_special_tokens
        self.scorer = Scorer(parts.runtime, self.reader, query, allows_special, parts.prefix_store)
        self._calibration = parts.calibration
        self._highlighter = Highlighter(parts.runtime, self.scorer, self._scores, allow_special_tokens=allows_special)
        self._has_payload_store, self._has_prefix_store = parts.payload_store is not None, parts.prefix_store is not None

    def n_light(self, lists: Sequence[list[AnyPassage] | Reading]) -> int | None:
        """Return the number of passages if reading and ranking them takes little time beside the model's; else None.

        Where a store is asked, nobody knows.
        """
        n_passages = sum(map(len, lists))
        if self._has_prefix_store or n_passages > LIGHT_PASSAGES:
            return None
        weight = 0
        unread: list[str] = []
        for passage in (passage for passages in lists if not isinstance(passages, Reading) for passage in passages):
            text, value = (passage.text, passage.encoding) if isinstance(passage, Passage) else (passage, None)
            if isinstance(text, str):
                weight += CHARACTER_WEIGHT * len(text)
                unread.append(text)
            if isinstance(value, str):
                weight += len(value)
                if self._has_payload_store:
                    return None
        if weight > LIGHT_WEIGHT or (self._has_payload_store and not self.reader.remembers(unread)):
            return None
        return n_passages

    def answer(self, request: RankRequest) -> Flow[list[Ranking]]:
        """Return the ranking of each query's passages."""
        rankings: list[Ranking] = []
        for part in _slices(request.lists, MAX_PASSAGES_AT_ONCE):
            readings = self._read(request.lists[part])
            if request.spans is not None:
                _check_texts(readings)
            found = {id(reading.encodings): reading.encodings for reading in readings}.values()
            encodings = {key: encoding for of_reading in found for key, encoding in of_reading.items()}
            made = yield from self._encode(readings, encodings)
            encodings |= made
            if made and self.reader.through is not None:
                self.reader.through.put(made.values())
            margins: list[list[Margin]] = [[] for _ in readings]
            if encodings:
                margins = yield from self.scorer.margins(request.queries[part], readings, encodings, request.instruction)
            ranked_lists = []
            for reading, of_query, first_stage in zip(readings, margins, request.first_stages[part], strict=True):
                values = [margin.value for margin in of_query]
                ranked = request.rules.apply(values, self._scores(values), reading.texts, first_stage)
                ranked_lists.append([_with_window(one, reading, of_query, encodings) for one in ranked])
            if request.spans is not None:
                queries = request.queries[part]
                yield from self._add_spans(ranked_lists, request, queries, readings, encodings, margins)
            for reading, ranked in zip(readings, ranked_lists, strict=True):
                not_stored = {index: encodings[reading.keys[index]] for index in reading.not_stored}
                encoded = [index for index in not_stored if reading.keys[index] in made]
                rankings.append(Ranking(ranked, reading, encoded, self._to_write(not_stored)))
        return rankings

    def _add_spans(
        self,
        ranked_lists: Sequence[list[RankedPassage]],
        request: RankRequest,
        queries: Sequence[str],
        readings: Sequence[Reading],
        encodings: Mapping[Hashable, EncodedPassage],
        margins: Sequence[Sequence[Margin]],
    ) -> Flow[None]:
        """Put spans on the best passages of each query."""
        places = [(query, rank) for query, ranked in enumerate(ranked_lists) for rank in range(len(ranked[: request.spans]))]
        asked = []
        for query, rank in places:
            passage = ranked_lists[query][rank]
            encoding, window = encodings[readings[query].keys[passage.index]], margins[query][passage.index].window
            asked.append(Asked(query, passage.text or "", encoding, None if encoding.windows is None else window))
        spans = yield from self._highlighter.highlight(queries, asked, request.instruction)
        for (query, rank), found in zip(places, spans, strict=True):
            ranked_lists[query][rank] = replace(ranked_lists[query][rank], spans=found)

    def load(self, sides: Sequence[str]) -> Flow[None]:
        """Load the embeddings and the weights of the sides ("encoder", "decoder")."""
        runtime = self._runtime

        def load(names: list[str | None]) -> list[object]:
            return [runtime.embedding() if name is None else runtime.stack(name) for name in names]

        yield Job(Work(load, size=1), [None, *sides])

    def encode_passages(self, texts: Iterable[str], *, show_progress: bool) -> Flow[list[EncodedPassage]]:
        """Return the encodings of texts; see `KalmReranker.encode_passages`."""
        encodings = yield from self.writer.encode_texts(texts, show_progress=show_progress)
        return self.writer.fit_inline(encodings)

    def encode_to_metadata(self, texts: Iterable[str], *, show_progress: bool) -> Flow[list[Metadata]]:
        """Return the metadata to store with texts."""
        encodings = yield from self.writer.encode_texts(texts, show_progress=show_progress)
        return self.writer.to_metadata(encodings)

    def prepare(
        self, passages: Iterable[AnyPassage] | Reading, instruction: str | None, *, show_progress: bool = False
    ) -> Flow[None]:
        """Compute the prefix states of passages; see `KalmReranker.prepare`."""
        instruction = check_instruction(instruction)
        show_progress = checked_flag(show_progress, "show_progress")
        given = checked_passages(passages)
        size = MAX_PASSAGES_AT_ONCE
        parts = [given] if isinstance(given, Reading) else [given[i : i + size] for i in range(0, len(given), size)]
        for part in parts:
            reading = self.reader.use(part)
            made = yield from self._encode([reading], reading.encodings, is_bulk=True)
            encodings = {**reading.encodings, **made}
            yield from self.scorer.prepare(encodings.values(), instruction, show_progress=show_progress)

    def _read(self, lists: Sequence[list[AnyPassage] | Reading]) -> list[Reading]:
        """Read the passages of several queries together, so that what they share is read once."""
        given = [passage for passages in lists if not isinstance(passages, Reading) for passage in passages]
        whole = self.reader.use(given)
        readings, start = [], 0
        for passages in lists:
            if isinstance(passages, Reading):
                readings.append(self.reader.use(passages))
            else:
                readings.append(whole.part(start, start + len(passages)))
                start += len(passages)
        return readings

    def _encode(
        self, readings: Iterable[Reading], known: Any, *, is_bulk: bool = False
    ) -> Flow[dict[Hashable, EncodedPassage]]:
        """Encode the texts whose encodings are not known."""
        texts = {key: text for reading in readings for key, text in reading.unencoded.items() if key not in known}
        return (yield from self.writer.encode(texts, is_bulk=is_bulk)) if texts else {}

    def _to_write(self, encodings: dict[int, EncodedPassage]) -> Any:
        """Return a function that writes the metadata of passages by their indices."""

        def write(indices: Sequence[int]) -> list[Metadata]:
            return call_plainly(lambda: self.writer.to_metadata([encodings[index] for index in indices]))

        return write

    def _scores(self, margins: Sequence[float]) -> list[float]:
        """Return P(yes) for margins, in float32 as the reference's softmax over two logits gives it."""
        if self._calibration is not None:
            margins = [self._calibration.apply(margin) for margin in margins]
        # One at a time: over several, torch computes the last ones by another path, which may differ in the last bit.
        return [float(torch.sigmoid(torch.tensor(margin, dtype=torch.float32))) for margin in margins]


def _with_window(
    ranked: RankedPassage, reading: Reading, margins: Sequence[Margin], encodings: Mapping[Hashable, EncodedPassage]
) -> RankedPassage:
    """Return a ranked passage with the place of its best window, if it has several."""
    windows = encodings[reading.keys[ranked.index]].windows
    if windows is None or len(windows) == 1:
        return ranked
    window = windows[margins[ranked.index].window]
    if ranked.text is None:
        return replace(ranked, window=(window.start, window.end))
    [place] = ranges_in(ranked.text, [window.place_in(without_surrogates(ranked.text))])
    return replace(ranked, window=place)


def _check_texts(readings: Iterable[Reading]) -> None:
    """Refuse passages without a text, in which there are no sentences.

    Raises:
        SettingsError: there is one.
    """
    if any(None in reading.texts for reading in readings):
        msg = "spans are parts of a text, but an EncodedPassage has none; pass Passage(text, encoding.to_metadata())"
        raise SettingsError(msg)


def _slices(lists: Sequence[Sequence[object]], limit: int) -> Iterator[slice]:
    """Cut lists into runs of at most `limit` items together; a longer list makes a run of its own."""
    start, n_items = 0, 0
    for index, items in enumerate(lists):
        if index > start and n_items + len(items) > limit:
            yield slice(start, index)
            start, n_items = index, 0
        n_items += len(items)
    yield slice(start, len(lists))
