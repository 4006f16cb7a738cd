"""Training data: BEIR folders and JSON lines become passages and queries that know their passages."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from kalm_integrations.core.settings import describe_problems
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.jsonl import parse_file, parse_object
from kalm_integrations.errors import SettingsError

if TYPE_CHECKING:
    from kalm_integrations.training.config import CollectionConfig, PseudoQueryConfig

MAX_PSEUDO_WORDS = 200
"""Words of a passage, from its start, that pseudo-queries are made of."""


class Example(BaseModel):
    """A line of training data."""

    model_config = ConfigDict(extra="forbid", strict=True)

    query: str = Field(min_length=1)
    positives: list[str] = Field(min_length=1)
    """Passages that answer the query; each is one to be found."""
    negatives: list[str] = []
    """Passages that do not; none: lexical neighbours of the positive are taken from the other lines' passages."""
    instruction: str | None = None
    positive_scores: list[FiniteFloat] | None = None
    """A teacher's margins, logit(yes) - logit(no), in the order of `positives`."""
    negative_scores: list[FiniteFloat] | None = None

    @model_validator(mode="after")
    def _check_together(self) -> Example:
        both = set(self.positives) & set(self.negatives)
        if both:
            msg = f"a passage must be a positive or a negative, but this one is both: {next(iter(both))[:80]!r}"
            raise ValueError(msg)
        if (self.positive_scores is None) != (self.negative_scores is None):
            msg = "positive_scores and negative_scores come together, but only one of them is there"
            raise ValueError(msg)
        for name in ("positive", "negative"):
            scores, passages = getattr(self, f"{name}_scores"), getattr(self, f"{name}s")
            if scores is not None and len(scores) != len(passages):
                msg = f"{name}_scores must be one for each of {name}s, but are {len(scores)} for {len(passages)}"
                raise ValueError(msg)
        return self


@dataclass(frozen=True)
class Query:
    """A query and its passages, by their positions in the training set."""

    text: str
    instruction: str | None
    """None: the checkpoint's."""
    positives: tuple[int, ...]
    negatives: tuple[int, ...] = ()
    """Given ones; without any, lexical neighbours of a positive are taken."""
    margins: Mapping[int, float] = field(default_factory=dict)
    """A teacher's, of all positives and negatives, or of none."""


@dataclass(frozen=True)
class TrainingSet:
    """Passages, and the queries that have a passage among them."""

    name: str
    passages: Sequence[str]
    queries: Sequence[Query]
    n_real: int
    """Queries from here on are made of passages."""

    def with_pseudo_queries(self, config: PseudoQueryConfig, seed: int) -> TrainingSet:
        """Return the set with queries made of the passages: spans whose words are partly left out."""
        generator = random.Random(seed)
        made = [
            Query(span, None, (position,))
            for position, passage in enumerate(self.passages)
            for span in _spans(passage, config, generator)
        ]
        return replace(self, queries=[*self.queries, *made])


def read_training_set(config: CollectionConfig) -> TrainingSet:
    """Read a BEIR folder or a file of JSON lines.

    Raises:
        SettingsError: there is no such file or folder, it holds no query with a passage, or a line is malformed: the message
            names file and line.
    """
    path = config.path
    if path.is_dir():
        training_set = _from_collection(Collection.read(path, config.split), config)
    elif path.is_file():
        training_set = from_examples(parse_file(path, parse_example), config.name, config.instruction)
    else:
        msg = f"a collection must be a BEIR folder or a file of JSON lines, but {path} is not there"
        raise SettingsError(msg)
    if not training_set.queries:
        msg = f"a collection must hold a query with a relevant passage at least, but {path} holds none"
        raise SettingsError(msg)
    return training_set


def parse_example(line: str) -> Example:
    """Read a line of training data.

    Raises:
        SettingsError: it breaks a rule.
    """
    row = parse_object(line)
    try:
        return Example.model_validate(row)
    except ValidationError as error:
        msg = describe_problems(error)
        # A problem with a whole passage quotes it.
        msg = f"not an example: {msg if len(msg) <= 400 else msg[:400] + ' …'}"
        raise SettingsError(msg) from error


def from_examples(examples: Iterable[Example], name: str, instruction: str | None = None) -> TrainingSet:
    """Return examples as a training set; passages that occur repeatedly are one.

    Args:
        examples: the lines.
        name: of the set.
        instruction: of examples without their own.
    """
    positions: dict[str, int] = {}
    queries = []
    for example in examples:
        positives, negatives = (
            tuple(dict.fromkeys(positions.setdefault(text, len(positions)) for text in texts))
            for texts in (example.positives, example.negatives)
        )
        margins: dict[int, float] = {}
        if example.positive_scores is not None and example.negative_scores is not None:
            texts = [*example.positives, *example.negatives]
            scores = [*example.positive_scores, *example.negative_scores]
            margins = {positions[text]: score for text, score in zip(texts, scores, strict=True)}
        queries.append(Query(example.query, example.instruction or instruction, positives, negatives, margins))
    return TrainingSet(name, list(positions), queries, len(queries))


def _from_collection(collection: Collection, config: CollectionConfig) -> TrainingSet:
    positions = {passage_id: position for position, passage_id in enumerate(collection.passages)}
    queries = []
    for query_id, text in collection.queries.items():
        grades = collection.qrels[query_id]
        positives = tuple(positions[p] for p, grade in grades.items() if grade > 0 and p in positions)
        if positives:
            queries.append(Query(text, config.instruction, positives))
    return TrainingSet(config.name, list(collection.passages.values()), queries, len(queries))


def _spans(passage: str, config: PseudoQueryConfig, generator: random.Random) -> list[str]:
    words = passage.split()[:MAX_PSEUDO_WORDS]
    if not words:
        return []
    spans = []
    for _ in range(config.per_passage):
        n_words = generator.randint(config.min_words, config.max_words)
        start = generator.randrange(max(1, len(words) - n_words))
        span = words[start : start + n_words]
        kept = [word for word in span if generator.random() >= config.dropped]
        spans.append(" ".join(kept or span))
    return spans
