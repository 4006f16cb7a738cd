"""KalmReranker: the facade over model, encodings and caches, and the only module that sees all three."""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalm_integrations.core import prompts
from kalm_integrations.core.caches import BoundedCache, CacheKey, LmdbPayloadStore
from kalm_integrations.core.calibration import Calibration
from kalm_integrations.core.encoding import EncodedPassage, fingerprint, hash_text
from kalm_integrations.core.fusion import check_first_stage, check_first_stages, check_fusion, fuse
from kalm_integrations.core.memory import PrefixStates
from kalm_integrations.core.prefixes import Candidate, Prefix, PrefixKey
from kalm_integrations.core.ranking import best_first, check_cut
from kalm_integrations.core.runtime import Runtime, get_runtime
from kalm_integrations.core.settings import (
    EncoderSettings,
    QuerySettings,
    StorageSettings,
    make_settings,
    poolable_ratios,
)
from kalm_integrations.core.types import (
    ENCODING_KEY,
    FINGERPRINT_KEY,
    AnyPassage,
    FusionMethod,
    Passage,
    RankedPassage,
    Reranker,
    RuntimeStats,
)
from kalm_integrations.errors import (
    CorruptEncodingError,
    EncodingError,
    EncodingTooLargeError,
    SettingsError,
    StaleEncodingError,
)

if TYPE_CHECKING:
    import torch

    from kalm_integrations.core.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

MAX_PASSAGES_AT_ONCE = 4096
"""Passages that `rank_many` works on at a time: what bounds the encodings in memory, beside the caches."""


class KalmReranker:
    """Scores passages for a query with a KaLM-Reranker-V1 model, encoding each passage once.

    Make one with `from_pretrained`. All methods may be called from any thread.

    ```python
    reranker = KalmReranker.from_pretrained("pico")
    encodings = reranker.encode_passages(passages)      # at ingest: once per passage
    reranker.rank("who won?", encodings, top_k=3)       # at query time: the decoder only
    ```
    """

    def __init__(
        self,
        runtime: Runtime,
        encoder: EncoderSettings,
        storage: StorageSettings,
        query: QuerySettings,
        payload_store: MutableMapping[str, bytes] | None = None,
        prefix_store: MutableMapping[str, bytes] | None = None,
    ) -> None:
        """Put the parts together; `from_pretrained` makes them."""
        self._payload_store = payload_store
        self._prefix_store = prefix_store
        self._runtime = runtime
        self._encoder = encoder
        self._storage = storage
        self._query = query
        self._calibration = _choose_calibration(query.calibration, runtime.checkpoint)
        self._cache: BoundedCache[CacheKey, EncodedPassage] = BoundedCache(query.cache_bytes)
        self._prefixes: BoundedCache[PrefixKey, PrefixStates] = BoundedCache(query.prefix_cache_bytes)
        self._stats = RuntimeStats()
        self._stats_lock = threading.Lock()
        self._warned: set[str] = set()

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] = "pico",
        *,
        revision: str | None = None,
        token: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        compression_ratio: int | None = None,
        storage_codec: str | None = None,
        max_inline_bytes: int | None = None,
        storage_mode: str | None = None,
        payload_store: MutableMapping[str, bytes] | str | os.PathLike[str] | None = None,
        max_passage_tokens: int | None = None,
        max_query_tokens: int | None = None,
        instruction: str | None = None,
        system_instruction: str | None = None,
        allow_special_tokens: bool = False,
        encode_batch_size: int | None = None,
        score_batch_size: int | None = None,
        cache_bytes: int | None = None,
        prefix_cache_bytes: int | None = None,
        prefix_dtype: str | None = None,
        prefix_store: MutableMapping[str, bytes] | str | os.PathLike[str] | None = None,
        calibration: bool | Calibration | Mapping[str, float] | None = None,
    ) -> KalmReranker:
        """Open a checkpoint. Its weights are loaded when they are first needed.

        Args:
            model: an alias (`pico` is built in; `nano`, `small`, `large`, `nano-r2`, `small-r2`, `large-r2` are fetched
                from the hub), a hub id, or a local folder.
            revision: branch, tag or commit of a hub id; aliases pin one.
            token: for private hub repositories; None leaves it to huggingface_hub (`HF_TOKEN`, a saved login).
            device: a torch device; None takes CUDA if there is one.
            dtype: "float32" or "bfloat16"; None takes bfloat16 on CUDA and float32 elsewhere.
            compression_ratio: encoder tokens per stored state (the paper's MEP factor, `chunk_size` upstream); 4 by
                default. A finer stored encoding is pooled to it, a coarser one is used as it is.
            storage_codec: how `EncodedPassage.to_metadata` writes states: fp32, fp16, bf16, int8 or int4.
            max_inline_bytes: if set, `encode_passages` chooses for each passage the finest ratio whose metadata string is not
                longer.
            storage_mode: "inline" puts encodings into the metadata string, "reference" puts them into `payload_store` and a
                short reference into the metadata; "auto" (the default) does the latter only where `max_inline_bytes` is
                too small for the coarsest ratio.
            payload_store: a mapping from str to bytes, or the folder of an LMDB store. Needed to write references, and to
                read them.
            max_passage_tokens: longer passages are cut, as the reference does; 1,024 by default.
            max_query_tokens: longer queries are cut; 512 by default.
            instruction: what makes a passage relevant; may also be given per query. Does not touch encodings.
            system_instruction: the sentence that tells the model to judge.
            allow_special_tokens: read strings such as `<end_of_turn>` in passages and queries as control tokens, as the
                reference does, instead of as text.
            encode_batch_size: passages per encoder batch; None chooses by device.
            score_batch_size: passages per decoder batch; None chooses by device.
            cache_bytes: bound of the in-memory cache of encodings; 256 MiB by default, 0 switches it off.
            prefix_cache_bytes: bound of the in-memory cache of prefix states, on the model's device; 1 GiB by default, 0
                switches it off. A passage whose states are there costs a query only the query's own tokens.
            prefix_dtype: what prefix states are kept in: "float32", "bfloat16" or "float16"; None takes the model's dtype,
                which changes no score.
            prefix_store: a mapping from str to bytes, or the folder of an LMDB store, that keeps prefix states on disk too, so
                that a passage's first query finds them (see `prepare`). It takes about 4 MB a passage for `nano` in float32,
                half of that in float16.
            calibration: makes scores probabilities: True takes what `kalm calibrate` has saved beside the checkpoint, or give
                `{"temperature": …, "bias": …}`. Off by default. Margins, the order and encodings do not depend on it.

        Raises:
            SettingsError: a setting is out of range or unknown.
            CheckpointError: the checkpoint is not there or cannot be used.
        """
        given = {
            k: v
            for k, v in locals().items()
            if k not in ("cls", "model", "revision", "device", "dtype", "payload_store", "prefix_store")
        }
        # Bad settings are refused before a checkpoint is fetched; its own defaults come in afterwards.
        kinds = (EncoderSettings, StorageSettings, QuerySettings)
        for kind in kinds:
            make_settings(kind, given)
        if payload_store is None and storage_mode == "reference":
            msg = "storage_mode='reference' needs a payload_store, but got None; pass a mapping or the folder of an LMDB store"
            raise SettingsError(msg)
        _check_store(payload_store, "payload_store")
        _check_store(prefix_store, "prefix_store")
        if not isinstance(model, (str, os.PathLike)):
            msg = f"model must be an alias, a hub id or a folder, but got {type(model).__name__}"
            raise SettingsError(msg)
        runtime = get_runtime(model, revision, device, dtype, token)
        defaults = runtime.checkpoint.defaults.model_dump(exclude={"calibration"})
        return cls(
            runtime,
            make_settings(EncoderSettings, given, defaults),
            make_settings(StorageSettings, given),
            make_settings(QuerySettings, given, defaults),
            _open_store(payload_store),
            _open_store(prefix_store),
        )

    @property
    def fingerprint(self) -> str:
        """What made an encoding: checkpoint content, tokenizer, template and encoder settings; 32 hex digits.

        Encodings with this fingerprint can be scored by this reranker, whoever made them, on whatever device.
        """
        return fingerprint(
            {
                "checkpoint": self._runtime.checkpoint.identity,
                "template": prompts.PASSAGE_TEMPLATE,
                "settings": self._encoder.model_dump(),
                "format": 1,
            }
        )

    @property
    def stats(self) -> RuntimeStats:
        """A snapshot of the counters."""
        return self._stats

    @property
    def runtime(self) -> Runtime:
        """The loaded model, which rerankers of the same checkpoint, device and dtype share."""
        return self._runtime

    @property
    def compression_ratio(self) -> int:
        """Encoder tokens per state."""
        return self._storage.compression_ratio

    @property
    def calibration(self) -> Calibration | None:
        """What makes scores of margins, if not the sigmoid alone."""
        return self._calibration

    def warm_up(self, *, encoder: bool = True, decoder: bool = True) -> None:
        """Load weights now: the encoder's instead of at the first miss, the decoder's instead of at the first score."""
        self._runtime.embedding()
        for side, is_wanted in (("encoder", encoder), ("decoder", decoder)):
            if is_wanted:
                self._runtime.stack(side)

    def encode_passages(self, texts: Sequence[str], show_progress: bool = False) -> list[EncodedPassage]:
        """Encode passages; duplicates, and passages still in memory, are not encoded again.

        Args:
            texts: the passages, without the template's prefix.
            show_progress: draw a progress bar.

        Returns:
            The encodings, in order, at `compression_ratio`, or coarser where `max_inline_bytes` demands it.

        Raises:
            SettingsError: `texts` is one string, or holds something else than strings.
            EncodingTooLargeError: a passage does not fit `max_inline_bytes` even at the coarsest ratio.
        """
        texts = _checked_list(texts, "texts")
        for text in texts:
            if not isinstance(text, str):
                msg = f"texts must be strings, but got {type(text).__name__}"
                raise SettingsError(msg)
        hashes = [self._text_hash(text) for text in texts]
        wanted = dict(zip(hashes, texts, strict=True))
        encodings = {h: self._fit_inline(e) for h, e in self._encode(wanted, show_progress=show_progress).items()}
        return [encodings[text_hash] for text_hash in hashes]

    def encode_to_metadata(self, texts: Sequence[str], show_progress: bool = False) -> list[dict[str, str]]:
        """Encode passages and return for each, in order, the metadata to store: `kalm_encoding` and `kalm_fp`.

        Args:
            texts: the passages, without the template's prefix.
            show_progress: draw a progress bar.

        Raises:
            SettingsError: `texts` is one string, or holds something else than strings.
            EncodingTooLargeError: a passage does not fit `max_inline_bytes`, and there is no `payload_store`.
        """
        encodings = self.encode_passages(texts, show_progress)
        payloads: dict[str, bytes] = {}
        values = [e.to_metadata(payloads if self._is_referenced(e) else None) for e in encodings]
        if payloads and self._payload_store is not None:
            self._payload_store.update(payloads)
        return [
            {ENCODING_KEY: value, FINGERPRINT_KEY: encoding.fingerprint}
            for value, encoding in zip(values, encodings, strict=True)
        ]

    def find_unencoded(self, passages: Sequence[Passage]) -> list[int]:
        """Return the indices of the passages whose encoding is missing, corrupt, or of another text or model.

        These are the ones that a query has to encode. Nothing is counted in `stats`.
        """
        current = self.fingerprint

        def is_unencoded(passage: Passage) -> bool:
            if passage.encoding is None:
                return True
            try:
                self._read(passage.encoding, self._text_hash(passage.text), current)
            except EncodingError:
                return True
            return False

        return [index for index, passage in enumerate(passages) if is_unencoded(passage)]

    def score(self, query: str, passages: Sequence[AnyPassage], instruction: str | None = None) -> list[float]:
        """Return P(yes) for each passage, in order.

        Args:
            query: the query.
            passages: texts, encodings, or `Passage`s (a text with the metadata string of its encoding, which is used if it
                is sound and otherwise made anew, and counted in `stats`).
            instruction: replaces the reranker's instruction for this call.

        Raises:
            SettingsError: an argument has the wrong type.
            StaleEncodingError: an `EncodedPassage` was made by another checkpoint or encoder setting.
            NonFiniteScoreError: the model produced NaN or infinite logits.
        """
        passages = _checked_list(passages, "passages")
        return self._scores(self._margins([query], [passages], instruction)[0])

    def rank(
        self,
        query: str,
        passages: Sequence[AnyPassage],
        top_k: int | None = None,
        score_threshold: float | None = None,
        instruction: str | None = None,
        *,
        first_stage_scores: Sequence[float] | None = None,
        fusion: FusionMethod | None = None,
        fusion_weight: float | None = None,
    ) -> list[RankedPassage]:
        """Return passages, best first; ties keep the order of `passages`.

        Args:
            query: the query.
            passages: see `score`.
            top_k: how many to return at most; None returns all.
            score_threshold: passages that score less are left out, before `top_k` is applied.
            instruction: replaces the reranker's instruction for this call.
            first_stage_scores: what the retriever gave the passages, higher is better; for `fusion`.
            fusion: order by both stages instead of by the reranker alone: "z_score" adds the scores, each scaled over the
                passages of this call; "reciprocal_rank" adds the reciprocal ranks, and without `first_stage_scores` takes
                the order of `passages` as the first stage's. `score` stays P(yes), and so does what `score_threshold` cuts
                by; `fused` has the value that decides.
            fusion_weight: the reranker's share in it, from 0 to 1; None takes the method's default.

        Raises:
            SettingsError: an argument has the wrong type or breaks a rule: `top_k` is not positive, `fusion` lacks the
                scores that it needs, or one of them is not finite.
            StaleEncodingError: an `EncodedPassage` was made by another checkpoint or encoder setting.
            NonFiniteScoreError: the model produced NaN or infinite logits.
        """
        check_cut(top_k, score_threshold)
        check_fusion(fusion, fusion_weight)
        passages = _checked_list(passages, "passages")
        first_stage = check_first_stage(first_stage_scores, len(passages), fusion)
        margins = self._margins([query], [passages], instruction)[0]
        fused = None if fusion is None else fuse(margins, first_stage, fusion, fusion_weight)
        return best_first(self._scores(margins), margins, top_k, score_threshold, fused)

    def _scores(self, margins: Sequence[float]) -> list[float]:
        """Return P(yes) for margins."""
        if self._calibration is not None:
            margins = [self._calibration.apply(margin) for margin in margins]
        return [_sigmoid(margin) for margin in margins]

    def rank_many(
        self,
        queries: Sequence[str],
        passages: Sequence[Sequence[AnyPassage]],
        top_k: int | None = None,
        score_threshold: float | None = None,
        instruction: str | None = None,
        *,
        first_stage_scores: Sequence[Sequence[float]] | None = None,
        fusion: FusionMethod | None = None,
        fusion_weight: float | None = None,
    ) -> list[list[RankedPassage]]:
        """Return the ranking of each query's passages: what `rank` returns for each, in less time.

        A passage that several queries share is read or encoded once, and its prefix states are computed once. For evaluation
        and offline jobs.

        Args:
            queries: the queries.
            passages: for each query, its passages; see `score`.
            top_k: how many to return at most per query; None returns all.
            score_threshold: passages that score less are left out, before `top_k` is applied.
            instruction: replaces the reranker's instruction for this call.
            first_stage_scores: for each query, its passages' scores; see `rank`.
            fusion: see `rank`.
            fusion_weight: see `rank`.

        Raises:
            SettingsError: an argument has the wrong type or breaks a rule, or there are not as many lists as queries.
            StaleEncodingError: an `EncodedPassage` was made by another checkpoint or encoder setting.
            NonFiniteScoreError: the model produced NaN or infinite logits.
        """
        check_cut(top_k, score_threshold)
        check_fusion(fusion, fusion_weight)
        queries = _checked_list(queries, "queries")
        lists = [_checked_list(candidates, "passages of a query") for candidates in _checked_list(passages, "passages")]
        if len(queries) != len(lists):
            msg = f"rank_many needs a list of passages for each query, but got {len(queries)} queries and {len(lists)} lists"
            raise SettingsError(msg)
        first_stages = check_first_stages(first_stage_scores, lists, fusion)
        rankings: list[list[RankedPassage]] = []
        for part in _slices(lists, MAX_PASSAGES_AT_ONCE):
            found = self._margins(queries[part], lists[part], instruction)
            for margins, first_stage in zip(found, first_stages[part], strict=True):
                fused = None if fusion is None else fuse(margins, first_stage, fusion, fusion_weight)
                rankings.append(best_first(self._scores(margins), margins, top_k, score_threshold, fused))
        return rankings

    def prepare(self, passages: Sequence[AnyPassage], instruction: str | None = None, show_progress: bool = False) -> None:
        """Compute the prefix states of passages now, at ingest, instead of at their first query.

        They go into `prefix_store`, and into memory as far as `prefix_cache_bytes` reaches. What is kept already is not
        computed again.

        Args:
            passages: see `score`.
            instruction: of the queries to come; None takes the reranker's.
            show_progress: draw a progress bar.

        Raises:
            SettingsError: an argument has the wrong type, or there is nowhere to keep states.
            StaleEncodingError: an `EncodedPassage` was made by another checkpoint or encoder setting.
        """
        _check_instruction(instruction)
        passages = _checked_list(passages, "passages")
        tokenizer = self._runtime.tokenizer(allow_special_tokens=self._encoder.allow_special_tokens)
        prefix = self._prefix(tokenizer.prompt_prefix(*self._instructions(instruction)))
        if prefix is None:
            msg = "prepare needs somewhere to keep prefix states, but prefix_cache_bytes is 0 and there is no prefix_store"
            raise SettingsError(msg)
        for part in range(0, len(passages), MAX_PASSAGES_AT_ONCE):
            _, encodings = self._resolve(passages[part : part + MAX_PASSAGES_AT_ONCE])
            candidates = [_candidate(encoding) for encoding in encodings.values()]
            self._runtime.prepare(candidates, prefix, self._query.score_batch_size, show_progress=show_progress)

    def _instructions(self, instruction: str | None) -> tuple[str, str]:
        """Return the system instruction, and the instruction of a call."""
        return self._query.system_instruction, self._query.instruction if instruction is None else instruction

    def _margins(
        self, queries: Sequence[str], lists: Sequence[Sequence[AnyPassage]], instruction: str | None
    ) -> list[list[float]]:
        """Return the margins of each query's passages."""
        for query in queries:
            if not isinstance(query, str):
                msg = f"query must be a string, but got {type(query).__name__}"
                raise SettingsError(msg)
        _check_instruction(instruction)
        if not any(lists):
            return [[] for _ in lists]
        keys, encodings = self._resolve([passage for passages in lists for passage in passages])
        started = time.perf_counter()
        tokenizer = self._runtime.tokenizer(allow_special_tokens=self._encoder.allow_special_tokens)
        parts = self._instructions(instruction)
        prompts = [
            tokenizer.prompt(*parts, tokenizer.truncate_query(query, self._query.max_query_tokens)) for query in queries
        ]
        position = {key: index for index, key in enumerate(encodings)}
        indices = iter([position[key] for key in keys])
        asked = [[(query, next(indices)) for _ in passages] for query, passages in enumerate(lists)]
        pairs = list(dict.fromkeys(pair for row in asked for pair in row))
        margins = self._runtime.margins(
            prompts,
            [_candidate(encoding) for encoding in encodings.values()],
            pairs,
            tokenizer.answer_ids,
            self._query.score_batch_size,
            self._prefix(tokenizer.prompt_prefix(*parts)),
        )
        self._count(passages_scored=len(pairs), score_seconds=time.perf_counter() - started)
        by_pair = dict(zip(pairs, margins, strict=True))
        return [[by_pair[pair] for pair in row] for row in asked]

    def _prefix(self, token_ids: list[int]) -> Prefix | None:
        """Return the prompts' prefix and where its states are kept, or None where none are."""
        if self._prefixes.max_bytes == 0 and self._prefix_store is None:
            return None

        def count(n_in_memory: int, n_stored: int, n_computed: int) -> None:
            self._count(prefix_hits=n_in_memory, prefix_store_hits=n_stored, prefix_misses=n_computed)

        dtype = self._runtime.storage_dtype(self._query.prefix_dtype)
        return Prefix(tuple(token_ids), self._prefixes, self._prefix_store, dtype, self._runtime.dtype, count)

    def _resolve(self, passages: Sequence[AnyPassage]) -> tuple[list[object], dict[object, EncodedPassage]]:
        """Find or make the encoding of each passage.

        Returns:
            A key for each passage, and the encoding of each key; passages with the same text share a key.
        """
        keys: list[object] = []
        found: dict[object, EncodedPassage] = {}
        missing: dict[str, str] = {}
        refused: defaultdict[str, list[str | None]] = defaultdict(list)
        current = self.fingerprint
        for passage in passages:
            if isinstance(passage, EncodedPassage):
                # A text may be given at several ratios on purpose: here the object decides what is the same.
                keys.append(id(passage))
                if id(passage) not in found:
                    found[id(passage)] = self._at_ratio(self._checked(passage, current))
                continue
            text, value = (passage.text, passage.encoding) if isinstance(passage, Passage) else (passage, None)
            if not isinstance(text, str):
                got = f"a Passage of {type(text).__name__}" if isinstance(passage, Passage) else type(passage).__name__
                msg = f"passages must be str, EncodedPassage or Passage (of str), but got {got}"
                raise SettingsError(msg)
            text_hash = self._text_hash(text)
            keys.append(text_hash)
            if text_hash in found or value in refused[text_hash]:
                continue
            stored = self._read_or_count(value, text_hash, current)
            if stored is None:
                missing[text_hash] = text
                refused[text_hash].append(value)
            else:
                found[text_hash] = self._at_ratio(stored)
        missing = {text_hash: text for text_hash, text in missing.items() if text_hash not in found}
        found.update(self._encode(missing))
        return keys, found

    def _read(self, value: str, text_hash: str, current: str) -> EncodedPassage:
        """Return a stored encoding.

        Raises:
            CorruptEncodingError: it is not sound.
            StaleEncodingError: it belongs to another text or model.
        """
        stored = EncodedPassage.from_metadata(value, self._payload_store)
        width = self._runtime.checkpoint.encoder_config.hidden_width
        if stored.fingerprint != current or stored.text_hash != text_hash or stored.states.shape[1] != width:
            msg = f"an encoding must be of this text and of fingerprint {current}, but has {stored.fingerprint}"
            raise StaleEncodingError(msg)
        return stored

    def _read_or_count(self, value: str | None, text_hash: str, current: str) -> EncodedPassage | None:
        """Return a stored encoding, or None, counting why not."""
        if value is None:
            return None
        try:
            stored = self._read(value, text_hash, current)
        except CorruptEncodingError as error:
            self._count(corrupt=1)
            self._warn_once("corrupt", "a stored encoding is made anew (counted in stats.corrupt): %s", error)
            return None
        except StaleEncodingError:
            self._count(stale=1)
            return None
        self._count(cache_hits=1, metadata_hits=1)
        return stored

    def _checked(self, passage: EncodedPassage, current: str) -> EncodedPassage:
        if passage.fingerprint != current:
            msg = (
                f"an EncodedPassage must carry this reranker's fingerprint {current}, but has {passage.fingerprint}; encode "
                "the text again, or pass Passage(text, encoding), which does so by itself"
            )
            raise StaleEncodingError(msg)
        return passage

    def _at_ratio(self, encoding: EncodedPassage) -> EncodedPassage:
        """Pool a finer encoding to the reranker's ratio; one that cannot be is scored at its own."""
        ratio = self.compression_ratio
        if encoding.compression_ratio > ratio:
            self._count(coarser=1)
        elif ratio % encoding.compression_ratio == 0:
            return encoding.pool(ratio)
        return encoding

    def _encode(self, texts: dict[str, str], *, show_progress: bool = False) -> dict[str, EncodedPassage]:
        """Return the encodings of texts by hash, from memory or from the encoder, at the reranker's ratio."""
        if not texts:
            return {}
        current = self.fingerprint
        keys: dict[CacheKey, str] = {(current, text_hash): text for text_hash, text in texts.items()}
        # Under the model's lock, so that what another thread is encoding right now is found in the cache afterwards.
        with self._runtime.lock:
            found = self._cache.get_many(keys)
            missing = {key: text for key, text in keys.items() if key not in found}
            made = self._encode_now(missing, show_progress=show_progress) if missing else {}
            self._cache.put_many(made)
        self._count(cache_hits=len(found), cache_misses=len(missing))
        return {text_hash: encoding for (_, text_hash), encoding in (found | made).items()}

    def _encode_now(self, texts: dict[CacheKey, str], *, show_progress: bool) -> dict[CacheKey, EncodedPassage]:
        started = time.perf_counter()
        tokenizer = self._runtime.tokenizer(allow_special_tokens=self._encoder.allow_special_tokens)
        whole = tokenizer.passages([prompts.passage_text(text) for text in texts.values()])
        limit = self._encoder.max_passage_tokens
        n_truncated = sum(len(ids) > limit for ids in whole)
        if n_truncated:
            rule = "%d of %d passages are longer than max_passage_tokens=%d and were cut (counted in stats.truncated)"
            self._warn_once("truncated", rule, n_truncated, len(whole), limit)
        token_ids = [ids[:limit] for ids in whole]
        states = self._runtime.encode(
            token_ids, self.compression_ratio, self._query.encode_batch_size, show_progress=show_progress
        )
        self._count(passages_encoded=len(texts), truncated=n_truncated, encode_seconds=time.perf_counter() - started)
        return {
            key: EncodedPassage(rows, len(ids), self.compression_ratio, *key, self._storage.storage_codec)
            for key, ids, rows in zip(texts, token_ids, states, strict=True)
        }

    def _fit_inline(self, encoding: EncodedPassage) -> EncodedPassage:
        """Return the encoding at the finest published ratio whose string has at most `max_inline_bytes`."""
        limit = self._storage.max_inline_bytes
        if limit is None or self._storage.storage_mode == "reference":
            return encoding
        for ratio in poolable_ratios(encoding.compression_ratio):
            pooled = encoding.pool(ratio)
            if pooled.metadata_length() <= limit:
                return pooled
        if self._payload_store is not None and self._storage.storage_mode == "auto":
            return encoding
        msg = (
            f"an encoding must fit max_inline_bytes={limit}, but one takes {pooled.metadata_length()} characters even at "
            f"ratio {pooled.compression_ratio}; raise max_inline_bytes, use a smaller storage_codec, or give a payload_store"
        )
        raise EncodingTooLargeError(msg)

    def _is_referenced(self, encoding: EncodedPassage) -> bool:
        """Return whether an encoding's payload goes into the payload store."""
        mode, limit = self._storage.storage_mode, self._storage.max_inline_bytes
        return mode == "reference" or (mode == "auto" and limit is not None and encoding.metadata_length() > limit)

    def _text_hash(self, text: str) -> str:
        return hash_text(prompts.passage_text(text))

    def _count(self, **increments: float) -> None:
        with self._stats_lock:
            counted = {name: getattr(self._stats, name) + n for name, n in increments.items()}
            self._stats = replace(self._stats, **counted)

    def _warn_once(self, kind: str, message: str, *arguments: object) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(message, *arguments)


def as_reranker(model: Reranker | str | os.PathLike[str], **settings: Any) -> Reranker:
    """Return what an adapter was given as `model` as a reranker: itself if it is one, else `from_pretrained` of it.

    Says once per process that the built-in checkpoint is not the one for production.

    Raises:
        SettingsError: settings were given for a reranker that has its own.
    """
    if not isinstance(model, (str, os.PathLike)):
        given = sorted(name for name, value in settings.items() if value is not None)
        if given:
            msg = (
                f"a reranker given as model brings its own settings, but got {', '.join(given)} too; set them on the reranker"
            )
            raise SettingsError(msg)
        return model
    if model == "pico":
        _notice_pico()
    return KalmReranker.from_pretrained(model, **settings)


@functools.cache
def _notice_pico() -> None:
    logger.warning("using the small built-in checkpoint 'pico'; for production pass model='nano' or larger")


def _choose_calibration(wanted: bool | Calibration, checkpoint: Checkpoint) -> Calibration | None:
    """Return the calibration that was asked for.

    Raises:
        SettingsError: it is the checkpoint's, which has none.
    """
    if isinstance(wanted, Calibration):
        return wanted
    if wanted and checkpoint.defaults.calibration is None:
        msg = (
            f"calibration=True needs one in the checkpoint's kalm_reranker.json, but {checkpoint.folder} has none; make one "
            'with kalm calibrate, or pass {"temperature": …, "bias": …}'
        )
        raise SettingsError(msg)
    return checkpoint.defaults.calibration if wanted else None


def _check_store(store: object, name: str) -> None:
    """Check what was given as a store, before a folder is made of it."""
    if isinstance(store, (str, os.PathLike)):
        if Path(store).is_file():
            msg = f"{name} must be a mapping or a folder, but {os.fspath(store)!r} is a file"
            raise SettingsError(msg)
    elif store is not None and not isinstance(store, MutableMapping):
        msg = (
            f"{name} must be a mapping from str to bytes or the folder of an LMDB store, but got "
            f"{type(store).__name__}; wrap it in a collections.abc.MutableMapping"
        )
        raise SettingsError(msg)


def _open_store(store: MutableMapping[str, bytes] | str | os.PathLike[str] | None) -> MutableMapping[str, bytes] | None:
    return LmdbPayloadStore(store) if isinstance(store, (str, os.PathLike)) else store


def _checked_list(values: Sequence[Any], name: str) -> list[Any]:
    """Return the values as a list: an iterator is gone through once only, and what it makes must outlive the call."""
    if isinstance(values, (str, bytes, EncodedPassage, Passage)) or not isinstance(values, Iterable):
        msg = f"{name} must be a list, but got one {type(values).__name__}; put it into a list"
        raise SettingsError(msg)
    return list(values)


def _slices(lists: Sequence[Sequence[object]], limit: int) -> Iterator[slice]:
    """Cut lists into runs of at most `limit` items together; a longer list makes a run of its own."""
    start, n_items = 0, 0
    for index, items in enumerate(lists):
        if index > start and n_items + len(items) > limit:
            yield slice(start, index)
            start, n_items = index, 0
        n_items += len(items)
    yield slice(start, len(lists))


def _candidate(encoding: EncodedPassage) -> Candidate:
    """Return a passage to score; its key tells apart states of one text at several ratios and from several codecs."""
    checksum = zlib.crc32(encoding.states.numpy().data)
    return Candidate(encoding.states, (encoding.fingerprint, encoding.text_hash, encoding.compression_ratio, checksum))


def _check_instruction(instruction: object) -> None:
    if instruction is not None and not isinstance(instruction, str):
        msg = f"instruction must be a string or None, but got {type(instruction).__name__}"
        raise SettingsError(msg)


def _sigmoid(margin: float) -> float:
    """Return P(yes) in float32, as the softmax over two logits gives it."""
    import torch

    return float(torch.sigmoid(torch.tensor(margin, dtype=torch.float32)))
