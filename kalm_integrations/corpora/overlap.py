"""How much of an evaluation's texts a model has seen in training."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import numpy.typing as npt

RUN_WORDS = 12
"""Length of a run of words that hardly two authors write alike."""

RUN_CHARACTERS = 36
"""The same in scripts that put no spaces between words: two halves of a Japanese or Chinese collection, split between
documents, share runs of this length about as seldom as halves of an English one share twelve words."""

MAX_RUNS = 20_000_000
"""Of evaluation passages that are in memory, at 9 bytes each."""

TEXTS_PER_BLOCK = 2_000

FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that no word of a run loses its weight."""

UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese."""

Runs = npt.NDArray[np.uint64]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Overlap:
    """What of an evaluation occurs in the training data."""

    n_queries: int
    """Of the evaluation."""
    n_passages: int
    same_queries: int
    """Queries that are a training query or passage, but for case and spaces."""
    same_passages: int
    """Passages that are."""
    n_compared: int
    """Passages that were compared by runs: all, or a sample of those of a large collection."""
    near_passages: int
    """Of these, passages that are a training text, or share a run of twelve words with a training passage."""

    def __str__(self) -> str:
        """Return it as a sentence."""
        sample = "" if self.n_compared == self.n_passages else f", of a sample of {self.n_compared:,},"
        return (
            f"{self.same_queries:,} of {self.n_queries:,} queries and {self.same_passages:,} of {self.n_passages:,} passages "
            f"are in the training data; {self.near_passages:,} passages{sample} share a run of {RUN_WORDS} words with it"
        )


def find_overlap(
    *,
    training_queries: Iterable[str],
    training_passages: Iterable[str],
    queries: Sequence[str],
    passages: Sequence[str],
) -> Overlap:
    """Find texts of an evaluation in training data.

    Texts are the same if they differ in case and in white space only. Runs of words are compared by 64-bit hashes. What is in
    memory depends on the evaluation's size only: the training data may be a stream.

    Args:
        training_queries: those a model was, or is to be, trained on.
        training_passages: likewise.
        queries: of the evaluation.
        passages: of the evaluation. Of those with more than 20 million words together, a sample is compared by runs.
    """
    query_keys, passage_keys = ([_key(text) for text in texts] for texts in (queries, passages))
    wanted = {*query_keys, *passage_keys}
    seen: set[int] = set()
    compared, runs = _index(passages)
    found = np.zeros(len(runs), dtype=bool)
    for text in training_queries:
        seen |= wanted & {_key(text)}
    for block in _blocks(training_passages):
        seen |= wanted.intersection(map(_key, block))
        if len(runs):
            # In order, so that the search goes through memory once.
            hashes = np.sort(_runs(block)[0])
            places = np.searchsorted(runs, hashes).clip(max=len(runs) - 1)
            found[places[runs[places] == hashes]] = True
    near = {i for i in compared if passage_keys[i] in seen}
    shared = runs[found]
    for positions in _blocks(compared if len(shared) else []):
        hashes, owners = _runs([passages[i] for i in positions])
        near.update(positions[owner] for owner in owners[np.isin(hashes, shared)])
    return Overlap(
        n_queries=len(queries),
        n_passages=len(passages),
        same_queries=sum(key in seen for key in query_keys),
        same_passages=sum(key in seen for key in passage_keys),
        n_compared=len(compared),
        near_passages=len(near),
    )


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())


def _key(text: str) -> int:
    return hash(_normalised(text))


def _index(passages: Sequence[str]) -> tuple[list[int], Runs]:
    """Return the positions of passages to compare, all or a sample, and the hashes of their runs, sorted."""
    compared: list[int] = []
    parts: list[Runs] = [np.empty(0, dtype=np.uint64)]
    n_runs = 0
    for block in _blocks(random.Random(0).sample(range(len(passages)), len(passages))):
        hashes, _ = _runs([passages[i] for i in block])
        compared += block
        parts.append(hashes)
        n_runs += len(hashes)
        if n_runs >= MAX_RUNS:
            break
    runs = np.concatenate(parts)
    runs.sort()
    return compared, runs


def _runs(texts: Sequence[str]) -> tuple[Runs, npt.NDArray[np.int64]]:
    """Return the hashes of all runs of the texts, and of each run the position of its text."""
    spaced: list[tuple[int, Sequence[str]]] = []
    unspaced: list[tuple[int, Sequence[str]]] = []
    for position, text in enumerate(texts):
        normalised = _normalised(text)
        joined = normalised.replace(" ", "")
        is_unspaced = not joined.isascii() and 2 * len(UNSPACED.findall(joined)) > len(joined)
        if is_unspaced:
            unspaced.append((position, joined))
        else:
            spaced.append((position, normalised.split()))
    parts = [_rolled(spaced, RUN_WORDS), _rolled(unspaced, RUN_CHARACTERS)]
    return np.concatenate([hashes for hashes, _ in parts]), np.concatenate([owners for _, owners in parts])


def _rolled(texts: Sequence[tuple[int, Sequence[str]]], length: int) -> tuple[Runs, npt.NDArray[np.int64]]:
    """Return a polynomial of the hashes of `length` consecutive units at a time, and the positions of the runs' texts."""
    units = np.array([hash(unit) for _, text in texts for unit in text], dtype=np.int64).view(np.uint64)
    owners = np.repeat(np.array([position for position, _ in texts], np.int64), [len(text) for _, text in texts])
    n_runs = max(0, len(units) - length + 1)
    hashes = np.zeros(n_runs, dtype=np.uint64)
    for offset in range(length):
        hashes = hashes * FACTOR + units[offset : offset + n_runs]
    ends = owners[length - 1 :][:n_runs]
    is_whole = owners[:n_runs] == ends
    return hashes[is_whole], ends[is_whole]


def _blocks(items: Iterable[Item]) -> Iterator[list[Item]]:
    iterator = iter(items)
    while block := list(islice(iterator, TEXTS_PER_BLOCK)):
        yield block
