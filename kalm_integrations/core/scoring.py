"""Queries and passages to margins: prompts, and where the states of their common prefix are kept."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from kalm_integrations.core.flows import Flow
from kalm_integrations.core.forks import kept_property
from kalm_integrations.core.jobs import Job, Work, in_passages
from kalm_integrations.core.model.prefix_states import PrefixStates
from kalm_integrations.core.passages.caches import BoundedCache
from kalm_integrations.core.passages.encoding import EncodedPassage
from kalm_integrations.core.passages.guarded import guard
from kalm_integrations.core.passages.prefixes import PREFIX_DTYPES, Candidate, Prefix, PrefixKey, hash_config
from kalm_integrations.core.passes import (
    Pair,
    Row,
    check_margins,
    check_vocabulary,
    fetch_prefixes,
    prepare_work,
    score_rows,
    score_work,
)
from kalm_integrations.core.reading import Reader
from kalm_integrations.core.runtime import Runtime
from kalm_integrations.core.settings import QuerySettings
from kalm_integrations.core.types import Reading
from kalm_integrations.errors import SettingsError


class Margin(NamedTuple):
    """What a passage's score is made of."""

    value: float
    window: int
    """Index of the window that it is of; 0 where the passage was read in one piece."""


STORE_SLICE = 64
"""Rows whose prefix states are fetched from a store at a time: some 4 MB each for `nano` in float32."""


class Scorer:
    """Scores passages whose encodings are known; owns the cache and the store of prefix states."""

    def __init__(
        self,
        runtime: Runtime,
        reader: Reader,
        query: QuerySettings,
        allow_special_tokens: bool,
        prefix_store: MutableMapping[str, bytes] | None,
    ) -> None:
        """Make a scorer with an empty cache."""
        self._runtime = runtime
        self._reader = reader
        self._query = query
        self._allow_special_tokens = allow_special_tokens
        self._prefix_store = guard(prefix_store, "prefix_store", reader.count, must_write=False)
        self.prefixes: BoundedCache[PrefixKey, PrefixStates] = BoundedCache(query.prefix_cache_bytes)
        """Prefix states in memory."""

    def margins(
        self,
        queries: Sequence[str],
        readings: Sequence[Reading],
        encodings: Mapping[Hashable, EncodedPassage],
        instruction: str | None,
    ) -> Flow[list[list[Margin]]]:
        """Return the margins of each query's passages: those of their best windows, where they have some.

        All windows of all passages are scored together.

        Args:
            queries: the queries.
            readings: of each query's passages.
            encodings: of all of them, by the readings' keys.
            instruction: of the call; None takes the reranker's.
        """
        places: dict[Hashable, range] = {}
        candidates: list[Candidate] = []
        for key, encoding in encodings.items():
            parts = candidates_of(encoding)
            places[key] = range(len(candidates), len(candidates) + len(parts))
            candidates += parts
        asked = [[(query, key) for key in reading.keys] for query, reading in enumerate(readings)]
        passages = list(dict.fromkeys(passage for row in asked for passage in row))
        pairs = [(query, index) for query, key in passages for index in places[key]]
        margins = iter((yield from self.margins_of(queries, candidates, pairs, instruction)))
        self._reader.count(passages_scored=len(passages))
        best = {(query, key): _best([next(margins) for _ in places[key]]) for query, key in passages}
        return [[best[passage] for passage in row] for row in asked]

    def margins_of(
        self,
        queries: Sequence[str],
        candidates: Sequence[Candidate],
        pairs: Sequence[Pair],
        instruction: str | None,
        *,
        keeps_states: bool = True,
    ) -> Flow[list[float]]:
        """Return the margins of pairs of a query and a candidate, by their indices.

        Args:
            queries: the queries.
            candidates: what to score.
            pairs: which query is asked of which candidate.
            instruction: of the call; None takes the reranker's.
            keeps_states: whether prefix states are used and kept: not of what no other query will ask for.
        """
        started = time.perf_counter()
        tokenizer = self._runtime.tokenizer(allow_special_tokens=self._allow_special_tokens)
        parts = self._instructions(instruction)
        limit = self._query.max_query_tokens
        prompts = [tokenizer.prompt(*parts, tokenizer.truncate_query(query, limit)) for query in queries]
        prefix = self._prefix(tokenizer.prompt_prefix(*parts)) if keeps_states else None
        margins = [0.0] * len(pairs)
        seconds = time.perf_counter() - started
        for used, chosen, rows in score_rows(self._runtime, prompts, candidates, pairs, prefix):
            work = score_work(self._runtime, tokenizer.answer_ids, self._query.score_batch_size, used)
            results, computing = yield from self._run(work, rows, used)
            for index, margin in zip(chosen, results, strict=True):
                margins[index] = margin
            seconds += computing
        check_margins(margins, self._runtime)
        self._reader.count(score_seconds=seconds)
        return margins

    def prepare(self, encodings: Iterable[EncodedPassage], instruction: str | None, *, show_progress: bool) -> Flow[None]:
        """Compute and keep the prefix states of passages, as bulk work.

        Raises:
            SettingsError: there is nowhere to keep them.
        """
        tokenizer = self._runtime.tokenizer(allow_special_tokens=self._allow_special_tokens)
        prefix = self._prefix(tokenizer.prompt_prefix(*self._instructions(instruction)))
        if prefix is None:
            msg = "prepare needs somewhere to keep prefix states, but prefix_cache_bytes is 0 and there is no prefix_store"
            raise SettingsError(msg)
        check_vocabulary([list(prefix.token_ids)], self._runtime.checkpoint.decoder_config)
        parts = [candidates_of(encoding) for encoding in encodings]
        rows = [Row([], candidate, prefix) for candidates in parts for candidate in candidates]
        rows.sort(key=lambda row: -len(row.candidate.states))
        with tqdm(total=len(parts), desc="Prefill", unit="passage", disable=not show_progress) as progress:
            work = prepare_work(self._runtime, self._query.score_batch_size)
            report = in_passages(progress.update, len(rows), len(parts))
            yield from self._run(work, rows, prefix, is_bulk=True, report=report)

    def _run(
        self, work: Work[Row, Any], rows: Sequence[Row], prefix: Prefix | None, **settings: Any
    ) -> Flow[tuple[list[Any], float]]:
        """Return the results of rows, and the seconds that they took: all at once, or as many as a store is asked for."""
        results: list[Any] = []
        seconds = 0.0
        size = len(rows) if prefix is None or prefix.store is None else STORE_SLICE
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            fetch_prefixes(self._runtime, some)
            job = Job(work, some, **settings)
            results += yield job
            seconds += job.seconds
            if prefix is not None:
                prefix.flush()
        return results, seconds

    def _instructions(self, instruction: str | None) -> tuple[str, str]:
        """Return the system instruction, and the instruction of a call."""
        return self._query.system_instruction, self._query.instruction if instruction is None else instruction

    def _prefix(self, token_ids: list[int]) -> Prefix | None:
        """Return the prompts' prefix and where its states are kept, or None where none are."""
        if self.prefixes.max_bytes == 0 and self._prefix_store is None:
            return None

        def count(**counts: int) -> None:
            self._reader.count(**counts)
            if counts.get("prefix_corrupt"):
                rule = "stored prefix states are damaged, or another passage's, and are computed anew (stats.prefix_corrupt)"
                self._reader.warn_once("prefix_corrupt", rule)

        name = self._query.prefix_dtype
        dtype = self._runtime.dtype if name is None else PREFIX_DTYPES[name]
        ids = tuple(token_ids)
        return Prefix(ids, self._decoder, self.prefixes, self._prefix_store, dtype, self._runtime.dtype, count)

    @kept_property
    def _decoder(self) -> str:
        """Hash of the decoder's configuration; its weights are in every encoding's fingerprint."""
        return hash_config(self._runtime.checkpoint.decoder_config)


def candidates_of(encoding: EncodedPassage) -> list[Candidate]:
    """Return what is to be scored of a passage: each of its windows, or all of it.

    The keys tell apart states of one text at several ratios and from several codecs.
    """
    key = (encoding.fingerprint, encoding.text_hash, encoding.compression_ratio, encoding.digest)
    if encoding.windows is None:
        return [Candidate(encoding.states, key)]
    return [Candidate(states, (*key, "window", index)) for index, states in enumerate(encoding.window_states)]


def _best(margins: Sequence[float]) -> Margin:
    """Return the highest margin of a passage's windows; of equal ones, the first."""
    return max((Margin(margin, window) for window, margin in enumerate(margins)), key=lambda margin: margin.value)
