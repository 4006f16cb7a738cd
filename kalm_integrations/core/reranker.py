"""KalmReranker: the facade. It puts reading, writing, scoring and ranking together."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from kalm_integrations.core.base import RankRequest, Reranker
from kalm_integrations.core.flows import Driver, call_aside, call_plainly
from kalm_integrations.core.opening import Parts, open_parts, travelling
from kalm_integrations.core.passages.encoding import EncodedPassage
from kalm_integrations.core.passages.stores import LmdbPayloadStore
from kalm_integrations.core.ranker import Ranker
from kalm_integrations.core.ranking import check_count
from kalm_integrations.core.runtime import Runtime
from kalm_integrations.core.settings import Calibration
from kalm_integrations.core.types import AnyPassage, Metadata, Ranking, Reading, RuntimeStats, checked_flag, checked_texts
from kalm_integrations.errors import SettingsError

if TYPE_CHECKING:
    import torch


class KalmReranker(Reranker):
    """Scores passages for a query with a KaLM-Reranker-V1 model, encoding each passage once.

    Make one with `from_pretrained`. All methods may be called from any thread. A copy is the same reranker; a pickle opens the
    checkpoint anew with the same settings.

    ```python
    reranker = KalmReranker.from_pretrained("pico")
    encodings = reranker.encode_passages(passages)      # at ingest: once per passage
    reranker.rank("who won?", encodings, top_k=3)       # at query time: the decoder only
    ```
    """

    def __init__(self, parts: Parts | None = None, **settings: Any) -> None:
        """Put the parts together; `from_pretrained` opens them.

        Raises:
            SettingsError: a name or settings were given instead of parts.
        """
        if not isinstance(parts, Parts) or settings:
            name = parts if isinstance(parts, str) else "pico"
            msg = f"a reranker is opened by KalmReranker.from_pretrained({name!r}, ...), but KalmReranker(...) was called"
            raise SettingsError(msg)
        self._parts = parts
        self._ranker = Ranker(parts)
        self._driver = Driver(parts.runtime.engine, parts.query.max_queued_pairs)

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
        write_through: bool = False,
        max_store_bytes: int | None = None,
        max_passage_tokens: int | None = None,
        long_passages: str | None = None,
        max_windows: int | None = None,
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
        max_queued_pairs: int | None = None,
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
            storage_codec: how states are stored: fp32, fp16, bf16, int8, rot4, rot3 or rot2. What is encoded goes through it
                at once, so that a passage scores the same before and after it was stored; fp32 changes nothing.
            max_inline_bytes: if set, `encode_passages` chooses for each passage the finest ratio whose metadata string is not
                longer.
            storage_mode: "inline" puts encodings into the metadata string, "reference" puts them into `payload_store` and a
                short reference into the metadata; "auto" (the default) does the latter only where `max_inline_bytes` is
                too small for the coarsest ratio.
            payload_store: a mapping from str to bytes, the folder of an LMDB store, or the URL of a Redis server. Needed to
                write references, and to read them. Passages that carry no valid encoding are looked up in it by their text.
            write_through: put what had to be encoded into `payload_store`, after the answer, so that no reranker that has the
                store encodes the text again; see `flush`.
            max_store_bytes: what `write_through` lets an LMDB store grow to; the least recently used encodings go. None sets
                no bound.
            max_passage_tokens: longer passages are read in windows of so many tokens, or cut; 1,024 by default.
            long_passages: "windows", the default, encodes all of a longer passage, in windows that overlap, and scores it by
                the best one; "cut" reads its first `max_passage_tokens` only, as the reference does. Encodings of shorter
                passages do not depend on it.
            max_windows: windows of a passage at most; what is behind them is not read. 64 by default.
            max_query_tokens: longer queries are cut; 512 by default.
            instruction: what makes a passage relevant; may also be given per query. Does not touch encodings.
            system_instruction: the sentence that tells the model to judge.
            allow_special_tokens: read strings such as `<end_of_turn>` in passages and queries as control tokens, as the
                reference does, instead of as text.
            encode_batch_size: passages per encoder batch; None chooses by device.
            score_batch_size: passages per decoder batch; None chooses by device.
            cache_bytes: bound of the in-memory cache of encodings; 256 MiB by default, 0 switches it off. A quarter more keeps
                strings that were decoded, for the queries that ask for them again.
            prefix_cache_bytes: bound of the in-memory cache of prefix states, on the model's device; 1 GiB by default, 0
                switches it off. A passage whose states are there costs a query only the query's own tokens.
            prefix_dtype: what prefix states are kept in: "float32", "bfloat16", "float16" or "int8"; None takes the model's
                dtype, which changes no score.
            prefix_store: a mapping from str to bytes, or the folder of an LMDB store, that keeps prefix states on disk too, so
                that a passage's first query finds them (see `prepare`). It takes about 4 MB a passage for `nano` in float32,
                half of that in float16, a quarter in int8.
            calibration: makes scores probabilities: True takes what `kalm calibrate` has saved beside the checkpoint, or give
                `{"temperature": …, "bias": …}`. Off by default. Margins, the order and encodings do not depend on it.
            max_queued_pairs: how many pairs, or passages to encode, of all callers together may wait for the model; a request
                beyond that is refused with a `QueueFullError`, unless it is the only one. 65,536 by default.

        Raises:
            SettingsError: a setting is out of range or unknown.
            CheckpointError: the checkpoint is not there or cannot be used.
            StoreError: the folder of a store cannot be opened.
        """
        settings = {
            "revision": revision,
            "token": token,
            "device": device,
            "dtype": dtype,
            "compression_ratio": compression_ratio,
            "storage_codec": storage_codec,
            "max_inline_bytes": max_inline_bytes,
            "storage_mode": storage_mode,
            "payload_store": payload_store,
            "write_through": write_through,
            "max_store_bytes": max_store_bytes,
            "max_passage_tokens": max_passage_tokens,
            "long_passages": long_passages,
            "max_windows": max_windows,
            "max_query_tokens": max_query_tokens,
            "instruction": instruction,
            "system_instruction": system_instruction,
            "allow_special_tokens": allow_special_tokens,
            "encode_batch_size": encode_batch_size,
            "score_batch_size": score_batch_size,
            "cache_bytes": cache_bytes,
            "prefix_cache_bytes": prefix_cache_bytes,
            "prefix_dtype": prefix_dtype,
            "prefix_store": prefix_store,
            "calibration": calibration,
            "max_queued_pairs": max_queued_pairs,
        }
        return cls(call_plainly(lambda: open_parts(model, settings)))

    @property
    def model_name(self) -> str:
        """The model as it was given: an alias, a hub id or a folder."""
        return self._parts.model

    @property
    def fingerprint(self) -> str:
        """What made an encoding: checkpoint content, tokenizer, template and encoder settings; 32 hex digits.

        Encodings with this fingerprint can be scored by this reranker, whoever made them, on whatever device. Those of
        passages in windows have another one; see `fingerprints`.
        """
        return self._ranker.reader.fingerprint

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """See `Reranker`."""
        return self._ranker.reader.expected.fingerprints

    @property
    def stats(self) -> RuntimeStats:
        """A snapshot of the counters."""
        return self._ranker.reader.stats

    @property
    def runtime(self) -> Runtime:
        """The loaded model, which rerankers of the same checkpoint, device and dtype share."""
        return self._parts.runtime

    @property
    def compression_ratio(self) -> int:
        """Encoder tokens per state."""
        return self._parts.storage.compression_ratio

    @property
    def storage_codec(self) -> str:
        """How what `encode_passages` returns is stored, and what its states have gone through."""
        return self._parts.storage.storage_codec

    @property
    def max_passage_tokens(self) -> int:
        """Where longer passages are cut, or what their windows hold."""
        return self._parts.encoder.max_passage_tokens

    @property
    def max_tokens_read(self) -> int:
        """Tokens of a passage that are read at most, windows counted together."""
        return self._parts.encoder.max_passage_tokens * (self._parts.encoder.n_windows or 1)

    @property
    def calibration(self) -> Calibration | None:
        """What makes scores of margins, if not the sigmoid alone."""
        return self._parts.calibration

    @property
    def store_bytes(self) -> int | None:
        """Bytes that the payload store takes, if it is an LMDB store: of the others nobody can tell quickly."""
        store = self._parts.payload_store
        return store.nbytes if isinstance(store, LmdbPayloadStore) else None

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until what `write_through` has to write is written, or has failed; the end of the process waits by itself.

        Args:
            timeout: seconds to wait at most; None waits as long as it takes.

        Returns:
            False if the time was not enough.

        Raises:
            SettingsError: `timeout` is no number of seconds.
        """
        through = self._ranker.reader.through
        return through is None or through.flush(timeout)

    def truncate(self, texts: Iterable[str], max_tokens: int) -> list[str]:
        """Return texts cut behind their first tokens, for clients that ask for it; the others stay as they are.

        Args:
            texts: passages, without the template's prefix.
            max_tokens: how many tokens to keep of each.

        Raises:
            SettingsError: `texts` is one string or holds something else than strings, or `max_tokens` is not positive.
        """
        checked, limit = checked_texts(texts), check_count(max_tokens, "max_tokens")
        tokenizer = self._parts.runtime.tokenizer(allow_special_tokens=self._parts.encoder.allow_special_tokens)
        return checked if limit is None else tokenizer.cut_texts(checked, limit)

    def warm_up(self, *, encoder: bool = True, decoder: bool = True) -> None:
        """Load weights now: the encoder's instead of at the first miss, the decoder's instead of at the first score."""
        sides = {"encoder": checked_flag(encoder, "encoder"), "decoder": checked_flag(decoder, "decoder")}
        self._driver.run(self._ranker.load([side for side, is_wanted in sides.items() if is_wanted]))

    def encode_passages(self, texts: Iterable[str], show_progress: bool = False) -> list[EncodedPassage]:
        """Encode passages; duplicates, and passages still in memory, are not encoded again.

        Args:
            texts: the passages, without the template's prefix.
            show_progress: draw a progress bar.

        Returns:
            The encodings, in order, at `compression_ratio`, or coarser where `max_inline_bytes` demands it.

        Raises:
            SettingsError: `texts` is one string, or holds something else than strings.
            EncodingTooLargeError: a passage does not fit `max_inline_bytes` even at the coarsest ratio, and there is no
                `payload_store`.
        """
        return self._driver.run(self._ranker.encode_passages(texts, show_progress=show_progress))

    async def aencode_passages(self, texts: Iterable[str], show_progress: bool = False) -> list[EncodedPassage]:
        """Do what `encode_passages` does; no thread waits, and what is left is not encoded if the coroutine is cancelled."""
        return await self._driver.arun(self._ranker.encode_passages(texts, show_progress=show_progress))

    def encode_to_metadata(self, texts: Iterable[str], show_progress: bool = False) -> list[Metadata]:
        """Do what `encode_passages` does, but return the metadata to store: for each passage `kalm_encoding` and `kalm_fp`."""
        return self._driver.run(self._ranker.encode_to_metadata(texts, show_progress=show_progress))

    async def aencode_to_metadata(self, texts: Iterable[str], show_progress: bool = False) -> list[Metadata]:
        """Do what `encode_to_metadata` does, as `aencode_passages` does it."""
        return await self._driver.arun(self._ranker.encode_to_metadata(texts, show_progress=show_progress))

    def read(self, passages: Iterable[AnyPassage]) -> Reading:
        """Return the status of each passage's encoding: stored, cached, missing, stale or corrupt.

        Nothing is encoded, and nothing is counted in `stats` yet. `rank` and `score` take the reading in place of the
        passages, so that every string is decoded once.

        Raises:
            SettingsError: a passage has the wrong type.
            StaleEncodingError: an `EncodedPassage` was made by another checkpoint or encoder setting.
        """
        return call_plainly(lambda: self._ranker.reader.read(passages))

    async def aread(self, passages: Iterable[AnyPassage]) -> Reading:
        """See `Reranker`."""
        return await call_aside(lambda: self._ranker.reader.read(passages))

    def answer(self, request: RankRequest) -> list[Ranking]:
        """See `Reranker`."""
        return self._driver.run(self._ranker.answer(request), request.timeout, n_light=self._ranker.n_light(request.lists))

    async def aanswer(self, request: RankRequest) -> list[Ranking]:
        """See `Reranker`: no thread waits."""
        n_light = self._ranker.n_light(request.lists)
        return await self._driver.arun(self._ranker.answer(request), request.timeout, n_light=n_light)

    def prepare(
        self, passages: Iterable[AnyPassage] | Reading, instruction: str | None = None, show_progress: bool = False
    ) -> None:
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
        self._driver.run(self._ranker.prepare(passages, instruction, show_progress=show_progress))

    def __repr__(self) -> str:
        """Return checkpoint, device, precision, ratio and codec."""
        parts = self._parts
        settings = {
            "device": str(parts.runtime.device),
            "dtype": str(parts.runtime.dtype).removeprefix("torch."),
            "compression_ratio": parts.storage.compression_ratio,
            "storage_codec": parts.storage.storage_codec,
        }
        return f"KalmReranker({parts.model!r}, {', '.join(f'{name}={value!r}' for name, value in settings.items())})"

    def __copy__(self) -> KalmReranker:
        """Return the reranker itself: it has nothing to change, and its caches serve both."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> KalmReranker:
        """Return the reranker itself; see `__copy__`."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as name and settings, to be opened anew; a hub token stays here.

        Raises:
            SettingsError: a payload or prefix store lives in this process only.
        """
        return functools.partial(type(self).from_pretrained, self._parts.model, **travelling(self._parts.given)), ()
