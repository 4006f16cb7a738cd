"""Pairs of a query and a passage, scored together: what interfaces in the shape of a cross-encoder are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from kalm_integrations.core.base import Reranker
from kalm_integrations.core.types import AnyPassage, RankedPassage

QUERIES_PER_BLOCK = 128
"""Queries that are scored together at most; what they share is read once."""
PAIRS_PER_BLOCK = 4096
"""Pairs that are scored together, unless one query has more: rankings hold what was encoded for them."""


def score_pairs(
    reranker: Reranker,
    pairs: Sequence[tuple[str, AnyPassage]],
    instruction: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[RankedPassage]:
    """Return score and margin of each pair, in order. Pairs are grouped by query, wherever they stand.

    Args:
        reranker: scores them.
        pairs: query and passage.
        instruction: replaces the reranker's.
        progress: is told how many pairs have been scored since it was last called.
    """
    by_query: dict[str, list[int]] = {}
    for index, (query, _) in enumerate(pairs):
        by_query.setdefault(query, []).append(index)
    scored: dict[int, RankedPassage] = {}
    for block in _blocks(by_query):
        lists = [[pairs[index][1] for index in by_query[query]] for query in block]
        for query, ranked in zip(block, reranker.rank_many(block, lists, instruction=instruction), strict=True):
            scored.update((by_query[query][passage.index], passage) for passage in ranked)
            if progress is not None:
                progress(len(ranked))
    return [scored[index] for index in range(len(pairs))]


def _blocks(by_query: Mapping[str, Sequence[int]]) -> Iterator[list[str]]:
    """Cut queries into blocks."""
    block: list[str] = []
    n_pairs = 0
    for query, indices in by_query.items():
        if block and (len(block) == QUERIES_PER_BLOCK or n_pairs + len(indices) > PAIRS_PER_BLOCK):
            yield block
            block, n_pairs = [], 0
        block.append(query)
        n_pairs += len(indices)
    if block:
        yield block
