"""The work of each row, and the runner that interleaves them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from tools.parity import Parity

from benchmarks import plan
from benchmarks.peers import PEERS, Peer
from benchmarks.plan import RowSpec
from benchmarks.reference import score_with_states
from benchmarks.workload import Workload
from kalm_integrations import KalmReranker

PREFIX_CACHE_BYTES = 8 * 2**30
"""Room for the prefix states of every row of a run."""

WARM_UP_QUERY = 20
"""Index of a query that no round asks."""

Scores = dict[tuple[object, ...], list[float]]


@dataclass(frozen=True)
class Work:
    """What a round does. Only `score` is timed; both take the index of the query."""

    score: Callable[[int], Sequence[float]]
    before: Callable[[int], object] = lambda _: None


class Models:
    """What the rows of one dtype share; each model is made when a row first needs it."""

    def __init__(self, workload: Workload, dtype: str, device: str, *, are_peers_tiny: bool) -> None:
        self.workload = workload
        self.dtype = dtype
        self.device = device
        self._are_peers_tiny = are_peers_tiny
        self._peers: dict[str, Peer] = {}

    @cached_property
    def reference(self) -> Parity:
        return Parity(self.workload.folder, device=self.device, dtype=self.dtype)

    @cached_property
    def encoder(self) -> KalmReranker:
        """A reranker that only makes encodings, and keeps the weights loaded."""
        return self.reranker(prefix_cache_bytes=0)

    @cached_property
    def with_prefixes(self) -> KalmReranker:
        """A reranker that keeps the prefix states of all rows."""
        return self.reranker(prefix_cache_bytes=PREFIX_CACHE_BYTES)

    def reranker(self, **settings: Any) -> KalmReranker:
        """Return a reranker with empty caches."""
        settings = {"storage_codec": "fp32", **settings}
        return KalmReranker.from_pretrained(self.workload.folder, device=self.device, dtype=self.dtype, **settings)

    def peer(self, name: str) -> Peer:
        if name not in self._peers:
            self._peers[name] = Peer(PEERS[name], self.dtype, self.device, is_tiny=self._are_peers_tiny)
        return self._peers[name]


def _reference_cold(models: Models, spec: RowSpec) -> Work:
    passages = models.workload.passages(spec.passage_tokens, spec.measured)
    instruction = models.workload.instruction(spec.prompt)
    return Work(
        lambda i: models.reference.reference_scores(models.workload.query(spec.prompt, i), passages, instruction=instruction)
    )


def _reference_pooled(models: Models, spec: RowSpec) -> Work:
    encodings = models.workload.encodings(models.encoder, spec.passage_tokens, spec.measured)
    instruction = models.workload.instruction(spec.prompt)
    return Work(
        lambda i: score_with_states(models.reference.reference, models.workload.query(spec.prompt, i), instruction, encodings)
    )


def _ours_cold(models: Models, spec: RowSpec) -> Work:
    passages = models.workload.passages(spec.passage_tokens, spec.measured)
    instruction = models.workload.instruction(spec.prompt)
    reranker = models.reranker(cache_bytes=0, prefix_cache_bytes=0)
    return Work(lambda i: reranker.score(models.workload.query(spec.prompt, i), passages, instruction))


def _ours_pooled(models: Models, spec: RowSpec) -> Work:
    return _ours_with_states(models, spec, models.reranker(prefix_cache_bytes=0))


def _ours_prefix(models: Models, spec: RowSpec) -> Work:
    return _after_another_query(models, spec, models.with_prefixes)


def _ours_small(models: Models, spec: RowSpec, prefix_dtype: str) -> Work:
    reranker = models.reranker(prefix_cache_bytes=PREFIX_CACHE_BYTES, prefix_dtype=prefix_dtype)
    return _after_another_query(models, spec, reranker)


def _ours_disk(models: Models, spec: RowSpec) -> Work:
    reranker = models.reranker(prefix_cache_bytes=0, prefix_store=models.workload.folder / "prefixes")
    return _after_another_query(models, spec, reranker)


def _after_another_query(models: Models, spec: RowSpec, reranker: KalmReranker) -> Work:
    work = _ours_with_states(models, spec, reranker)
    work.score(WARM_UP_QUERY)
    return work


def _ours_with_states(models: Models, spec: RowSpec, reranker: KalmReranker) -> Work:
    encodings = models.workload.encodings(models.encoder, spec.passage_tokens, spec.measured)
    instruction = models.workload.instruction(spec.prompt)
    return Work(lambda i: reranker.score(models.workload.query(spec.prompt, i), encodings, instruction))


def _ours_first(models: Models, spec: RowSpec) -> Work:
    fresh: dict[str, Work] = {}

    def empty_caches(_: int) -> None:
        fresh["work"] = _ours_with_states(models, spec, models.reranker(prefix_cache_bytes=PREFIX_CACHE_BYTES))

    # Popped, so that the states that a round makes do not outlive it.
    return Work(lambda i: fresh.pop("work").score(i), before=empty_caches)


def _peer(models: Models, spec: RowSpec) -> Work:
    peer = models.peer(spec.name)
    token_ids = peer.token_ids(spec.prompt, spec.passage_tokens, spec.measured)
    return Work(lambda _: peer.score(token_ids))


BUILDERS: dict[str, Callable[[Models, RowSpec], Work]] = {
    plan.REFERENCE_COLD: _reference_cold,
    plan.REFERENCE_POOLED: _reference_pooled,
    plan.OURS_COLD: _ours_cold,
    plan.OURS_POOLED: _ours_pooled,
    plan.OURS_FIRST: _ours_first,
    plan.OURS_PREFIX: _ours_prefix,
    plan.OURS_HALF: partial(_ours_small, prefix_dtype="float16"),
    plan.OURS_INT8: partial(_ours_small, prefix_dtype="int8"),
    plan.OURS_DISK: _ours_disk,
    **dict.fromkeys(PEERS, _peer),
}

SAME_SCORES = {
    plan.REFERENCE_COLD: "cold",
    plan.OURS_COLD: "cold",
    plan.REFERENCE_POOLED: "pooled",
    plan.OURS_POOLED: "pooled",
    plan.OURS_FIRST: "pooled",
    plan.OURS_PREFIX: "pooled",
    plan.OURS_HALF: "pooled",
    plan.OURS_INT8: "pooled",
    plan.OURS_DISK: "pooled",
}
"""Rows that score the same passages from the same start."""


def measure_rows(
    specs: Sequence[RowSpec], models: Models, expected: Scores, each_round: Callable[[], object] = lambda: None
) -> list[dict[str, Any]]:
    """Measure rows in interleaved rounds.

    Args:
        specs: the rows, all of `models`' dtype.
        models: what they share.
        expected: the reference's first scores in float32, which its rows add to and ours are compared with.
        each_round: called at the start of every round.

    Returns:
        The fields of each row's spec, the threads, wall and CPU seconds of each round, and `max_difference` from the
        reference's float32 scores (None where it has not scored the same).
    """
    works = [_prepare(spec, models) for spec in specs]
    seconds: list[list[tuple[float, float]]] = [[] for _ in specs]
    first_scores: list[Sequence[float]] = [[] for _ in specs]
    n_rounds = max((spec.rounds for spec in specs), default=0)
    for round_index in range(n_rounds):
        each_round()
        for index, (spec, work) in enumerate(zip(specs, works, strict=True)):
            if not _is_due(spec.rounds, round_index, n_rounds):
                continue
            query = len(seconds[index])
            work.before(query)
            wall, cpu, scores = timed(lambda work=work, query=query: work.score(query), models.device)
            seconds[index].append((wall, cpu))
            first_scores[index] = first_scores[index] or scores
            progress(f"{spec.dtype} {spec.passage_tokens} tokens, {spec.name} ({spec.measured}): {wall:.2f} s")
    for spec, scores in zip(specs, first_scores, strict=True):
        if _is_expected(spec):
            expected[_scores_key(spec)] = list(scores)
    return [
        {
            **asdict(spec),
            "threads": torch.get_num_threads(),
            "wall": [wall for wall, _ in rounds],
            "cpu": [cpu for _, cpu in rounds],
            "max_difference": None if _is_expected(spec) else _max_difference(scores, expected.get(_scores_key(spec))),
        }
        for spec, rounds, scores in zip(specs, seconds, first_scores, strict=True)
    ]


def timed(run: Callable[[], Sequence[float]], device: str) -> tuple[float, float, Sequence[float]]:
    """Run once and return wall seconds, CPU seconds of all threads, and what came out."""
    _synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    scores = run()
    _synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu, scores


def progress(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def _prepare(spec: RowSpec, models: Models) -> Work:
    """Load what the row needs and touch its code on two passages, then make its work."""
    small = BUILDERS[spec.name](models, replace(spec, measured=2))
    small.before(WARM_UP_QUERY)
    small.score(WARM_UP_QUERY)
    return BUILDERS[spec.name](models, spec)


def _is_due(rounds: int, round_index: int, n_rounds: int) -> bool:
    """Spread a row's rounds evenly over all rounds."""
    return (round_index + 1) * rounds // n_rounds > round_index * rounds // n_rounds


def _is_expected(spec: RowSpec) -> bool:
    return spec.dtype == "float32" and spec.name in (plan.REFERENCE_COLD, plan.REFERENCE_POOLED)


def _scores_key(spec: RowSpec) -> tuple[object, ...]:
    return SAME_SCORES.get(spec.name), spec.prompt, spec.passage_tokens


def _max_difference(scores: Sequence[float], expected: Sequence[float] | None) -> float | None:
    if expected is None:
        return None
    return max(abs(ours - theirs) for ours, theirs in zip(scores, expected, strict=False))


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)
