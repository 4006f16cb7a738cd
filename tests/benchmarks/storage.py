"""What encodings and prefix states take: bytes, and the time to read encodings back."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.plan import SHORT
from benchmarks.rows import Models
from benchmarks.workload import Workload
from kalm_integrations import EncodedPassage, KalmReranker
from kalm_integrations.core.passages.codecs import write_states
from kalm_integrations.core.settings import CODEC_NAMES

RATIOS = (1, 2, 4, 8, 16, 32)
READ_ROUNDS = 7
PREFIX_DTYPES = ("float32", "bfloat16", "float16", "int8")


def measure_storage(workload: Workload, reranker: KalmReranker, n_tokens: int, n: int) -> list[dict[str, Any]]:
    """Write and read `n` encodings of passages of `n_tokens` tokens with every codec, at ratio 4, and size up all ratios.

    Returns:
        By codec: payload bytes and characters of one metadata string at each ratio, the median milliseconds in which
        `from_metadata` reads `n` of them at ratio 4, and `n`.
    """
    encodings = workload.encodings(reranker, n_tokens, n)
    finest = reranker.encode_passages(workload.passages(n_tokens, 1))[0]
    measured = []
    for codec in CODEC_NAMES:
        sizes = []
        for ratio in RATIOS:
            pooled = _at_ratio(finest, ratio)
            payload = write_states(pooled.states, codec)[1]
            length = len(replace(pooled, codec=codec).to_metadata())
            sizes.append({"ratio": ratio, "bytes": len(payload), "characters": length})
        values = [replace(encoding, codec=codec).to_metadata() for encoding in encodings]
        measured.append({"codec": codec, "n_tokens": n_tokens, "sizes": sizes, "read_n": n, "read_ms": _read_ms(values)})
    return measured


def measure_prefix_states(models: Models, passage_tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Return `dtype`, `n_tokens` and `bytes` of one passage's prefix states, for each storage dtype and passage length."""
    workload = models.workload
    measured = []
    for n_tokens in passage_tokens:
        encoding = workload.encodings(models.encoder, n_tokens, 1)
        for dtype in PREFIX_DTYPES:
            reranker = models.reranker(prefix_dtype=dtype)
            reranker.prepare(encoding, workload.instruction(SHORT))
            n_bytes = reranker._ranker.scorer.prefixes.nbytes
            measured.append({"dtype": dtype, "n_tokens": n_tokens, "bytes": n_bytes})
    return measured


def _at_ratio(encoding: EncodedPassage, ratio: int) -> EncodedPassage:
    """Return an encoding of the size that the ratio gives; one finer than it was made at repeats its states."""
    if ratio >= encoding.compression_ratio:
        return encoding.pool(ratio)
    repeated = encoding.states.repeat_interleave(encoding.compression_ratio // ratio, dim=0)
    return replace(encoding, states=repeated[: -(-encoding.n_tokens // ratio)], compression_ratio=ratio)


def _read_ms(values: list[str]) -> float:
    rounds = []
    for _ in range(READ_ROUNDS):
        started = time.perf_counter()
        for value in values:
            EncodedPassage.from_metadata(value)
        rounds.append(time.perf_counter() - started)
    return 1000 * statistics.median(rounds)
