"""Queries and passages to margins: prompts, and where the states of their common prefix are kept."""

from __future__ import annotations

import time
import zlib
from collections.abc import Hashable, Iterable, Mapping, MutableMapping, Sequence

from kalm_integrations.core.model.kv_cache import PrefixStates
from kalm_integrations.core.passages.caches import BoundedCache
from kalm_integrations.core.passages.encoding import EncodedPassage
from kalm_integrations.core.passages.guarded import guard
from kalm_integrations.core.passages.prefixes import PREFIX_DTYPES, Candidate, Prefix, PrefixKey
from kalm_integrations.core.passes import compute_margins, prepare_prefixes
from kalm_integrations.core.reading import Reader
from kalm_integrations.core.runtime import Runtime
from kalm_integrations.core.settings import QuerySettings
from kalm_integrations.core.types import Reading
from kalm_integrations.errors import SettingsError


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
    ) -> list[list[float]]:
        """Return the margins of each query's passages.

        Args:
            queries: the queries.
            readings: of each query's passages.
            encodings: of all of them, by the readings' keys.
            instruction: of the call; None takes the reranker's.
        """
        started = time.perf_counter()
        tokenizer = self._runtime.tokenizer(allow_special_tokens=self._allow_special_tokens)
        parts = self._instructions(instruction)
        limit = self._query.max_query_tokens
        prompts = [tokenizer.prompt(*parts, tokenizer.truncate_query(query, limit)) for query in queries]
        position = {key: index for index, key in enumerate(encodings)}
        asked = [[(query, position[key]) for key in reading.keys] for query, reading in enumerate(readings)]
        pairs = list(dict.fromkeys(pair for row in asked for pair in row))
        margins = compute_margins(
            self._runtime,
            prompts,
            [_candidate(encoding) for encoding in encodings.values()],
            pairs,
            tokenizer.answer_ids,
            self._query.score_batch_size,
            self._prefix(tokenizer.prompt_prefix(*parts)),
        )
        self._reader.count(passages_scored=len(pairs), score_seconds=time.perf_counter() - started)
        by_pair = dict(zip(pairs, margins, strict=True))
        return [[by_pair[pair] for pair in row] for row in asked]

    def prepare(self, encodings: Iterable[EncodedPassage], instruction: str | None, *, show_progress: bool) -> None:
        """Compute and keep the prefix states of passages.

        Raises:
            SettingsError: there is nowhere to keep them.
        """
        tokenizer = self._runtime.tokenizer(allow_special_tokens=self._allow_special_tokens)
        prefix = self._prefix(tokenizer.prompt_prefix(*self._instructions(instruction)))
        if prefix is None:
            msg = "prepare needs somewhere to keep prefix states, but prefix_cache_bytes is 0 and there is no prefix_store"
            raise SettingsError(msg)
        candidates = [_candidate(encoding) for encoding in encodings]
        prepare_prefixes(self._runtime, candidates, prefix, self._query.score_batch_size, show_progress=show_progress)

    def _instructions(self, instruction: str | None) -> tuple[str, str]:
        """Return the system instruction, and the instruction of a call."""
        return self._query.system_instruction, self._query.instruction if instruction is None else instruction

    def _prefix(self, token_ids: list[int]) -> Prefix | None:
        """Return the prompts' prefix and where its states are kept, or None where none are."""
        if self.prefixes.max_bytes == 0 and self._prefix_store is None:
            return None

        def count(n_in_memory: int, n_stored: int, n_computed: int) -> None:
            self._reader.count(prefix_hits=n_in_memory, prefix_store_hits=n_stored, prefix_misses=n_computed)

        name = self._query.prefix_dtype
        dtype = self._runtime.dtype if name is None else PREFIX_DTYPES[name]
        return Prefix(tuple(token_ids), self.prefixes, self._prefix_store, dtype, self._runtime.dtype, count)


def _candidate(encoding: EncodedPassage) -> Candidate:
    """Return a passage to score; its key tells apart states of one text at several ratios and from several codecs."""
    checksum = zlib.crc32(encoding.states.numpy().data)
    return Candidate(encoding.states, (encoding.fingerprint, encoding.text_hash, encoding.compression_ratio, checksum))
