"""Hard negatives: passages that look as if they answered a query."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kalm_integrations.corpora import peers
from kalm_integrations.corpora.bm25 import BM25
from kalm_integrations.corpora.jsonl import PassageFields, parse_file, parse_object
from kalm_integrations.errors import SettingsError
from kalm_integrations.training.config import CollectionConfig
from kalm_integrations.training.sources import TrainingSet, read_training_set
from kalm_integrations.training.teachers import Teacher

Method = Literal["bm25", "bi-encoder", "same-title"]

QUERIES_PER_BLOCK = 256
"""Queries that are searched for at a time."""


@dataclass(frozen=True)
class MiningSettings:
    """How negatives are chosen."""

    n_negatives: int = 15
    depth: int = 100
    """How many of the first candidates they are drawn from."""
    skip: int = 0
    """How many of the very first are left out: often they answer the query, and nobody marked them."""
    below_positive: float | None = None
    """With a teacher: leave out candidates whose margin is not at least this much below that of the best positive."""
    seed: int = 0


def mine(
    config: CollectionConfig,
    method: Method,
    settings: MiningSettings,
    encoder: str | None = None,
    teacher: Teacher | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield a line of training data for each query of a collection, in order.

    Args:
        config: where queries, positives and passages are read; negatives that lines bring are passages like others.
        method: "bm25"; "bi-encoder" (by cosine); or "same-title": the other passages of the positive's document, which share
            its title, at random (BEIR folders only).
        settings: how many, and which.
        encoder: for "bi-encoder": folder or hub id of a sentence-transformers model.
        teacher: gives the margins of all passages of a line.

    Raises:
        SettingsError: the collection cannot be read, or does not fit the method.
        MissingExtraError: a package that the method needs is not installed.
    """
    texts = read_training_set(config)
    generator = random.Random(settings.seed)
    for query, candidates in zip(texts.queries, _candidates(texts, config, method, settings, encoder), strict=True):
        positives = [texts.passages[p] for p in query.positives]
        known = set(query.positives)
        others = [p for p in candidates if p not in known][settings.skip : settings.depth]
        drawn = generator.sample(others, len(others))
        line: dict[str, Any] = {"query": query.text, "positives": positives}
        if query.instruction is not None:
            line["instruction"] = query.instruction
        if teacher is None:
            line["negatives"] = [texts.passages[p] for p in drawn[: settings.n_negatives]]
        else:
            line |= _with_margins(teacher, line, [texts.passages[p] for p in drawn], settings)
        if line["negatives"]:
            yield line


def _with_margins(teacher: Teacher, line: dict[str, Any], candidates: list[str], settings: MiningSettings) -> dict[str, Any]:
    """Return negatives, and the teacher's margins."""
    if settings.below_positive is None:
        candidates = candidates[: settings.n_negatives]
    positives = line["positives"]
    margins = teacher(line["query"], [*positives, *candidates], line.get("instruction"))
    of_positives, of_candidates = margins[: len(positives)], margins[len(positives) :]
    pairs = list(zip(candidates, of_candidates, strict=True))
    if settings.below_positive is not None:
        limit = max(of_positives) - settings.below_positive
        pairs = [pair for pair in pairs if pair[1] <= limit][: settings.n_negatives]
    return {
        "negatives": [text for text, _ in pairs],
        "positive_scores": of_positives,
        "negative_scores": [margin for _, margin in pairs],
    }


def _candidates(
    texts: TrainingSet, config: CollectionConfig, method: Method, settings: MiningSettings, encoder: str | None
) -> Iterator[Sequence[int]]:
    """Yield passages for each query, hardest first, its positives among them."""
    # Positives come off later.
    n_found = settings.depth + max(len(query.positives) for query in texts.queries)
    if method == "same-title":
        yield from _by_title(texts, config)
        return
    questions = [query.text for query in texts.queries]
    if method == "bm25":
        bm25 = BM25(texts.passages)
        for start in range(0, len(questions), QUERIES_PER_BLOCK):
            for indices, _ in bm25.search(questions[start : start + QUERIES_PER_BLOCK], n_found):
                yield indices
        return
    if encoder is None:
        msg = "the method bi-encoder needs a model, but got none; name one"
        raise SettingsError(msg)
    passages = {str(index): text for index, text in enumerate(texts.passages)}
    found = peers.search(encoder, passages, {str(index): text for index, text in enumerate(questions)}, n_found)
    for index in range(len(questions)):
        yield [int(passage) for passage, _ in found[str(index)]]


def _by_title(texts: TrainingSet, config: CollectionConfig) -> Iterator[Sequence[int]]:
    """Yield the passages with the title of a query's first positive."""
    corpus = config.path / "corpus.jsonl"
    if not corpus.is_file():
        msg = f"the method same-title needs a BEIR folder, whose passages have titles, but {config.path} is none"
        raise SettingsError(msg)
    positions = {text: position for position, text in enumerate(texts.passages)}
    titles: dict[int, Any] = {}
    by_title: dict[Any, list[int]] = {}
    for row in parse_file(corpus, parse_object):
        # Blank passages, and those whose text came before, have no position of their own.
        position = positions.get(PassageFields().read(row))
        title = row.get("title")
        if title and position is not None and position not in titles:
            titles[position] = title
            by_title.setdefault(title, []).append(position)
    for query in texts.queries:
        yield by_title.get(titles.get(query.positives[0]), [])
