"""Training data: BEIR folders, and rows of every layout, become passages and queries that know their passages."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kalm_integrations.corpora.beir import Collection, describe_counts
from kalm_integrations.corpora.candidates import read_rows
from kalm_integrations.corpora.jsonl import parse_each
from kalm_integrations.errors import SettingsError
from kalm_integrations.training.layouts import Example, read_example
from kalm_integrations.training.tables import is_table, read_table

if TYPE_CHECKING:
    from kalm_integrations.training.config import CollectionConfig, PseudoQueryConfig

logger = logging.getLogger(__name__)

MAX_PSEUDO_WORDS = 200
"""Words of a passage, from its start, that pseudo-queries are made of."""


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
    """Read a BEIR folder, or examples in any other format and layout.

    Texts are the same if nothing but white space at their ends differs. The rows of a query are united, if their instruction
    is the same, too, and passages are known by their texts. What is united or left out is counted in a line of the log.

    Raises:
        SettingsError: there is no such file or folder, it holds no query with a passage, or a row is malformed: the message
            names file and line.
        MissingExtraError: datasets is not installed, and the format needs it.
    """
    path = config.path
    if not path.exists():
        msg = f"a collection must be a file or a folder, but {path} is not there"
        raise SettingsError(msg)
    left_out: set[str] = set()
    oddities: Counter[str] = Counter()
    texts = _Texts(config.instruction, oddities)
    if is_table(path):
        for _, example in parse_each(
            read_table(path, config.split), f"{path}, row ", lambda row: read_example(row, left_out, is_table=True)
        ):
            texts.add(example)
    elif path.is_dir():
        texts.add_collection(Collection.read(path, config.split, oddities))
    else:
        for example in read_rows(path, lambda row: read_example(row, left_out)):
            texts.add(example)
    training_set = texts.finish(config.name)
    told = describe_counts(oddities)
    if left_out:
        told = "; ".join(filter(None, [told, f"columns left out: {', '.join(sorted(left_out))}"]))
    if told:
        logger.warning("%s: %s", path, told)
    if not training_set.queries:
        msg = f"a collection must hold a query with a relevant passage at least, but {path} holds none"
        raise SettingsError(msg)
    return training_set


@dataclass
class _United:
    """What all rows of a query say."""

    text: str
    instruction: str | None
    # Dictionaries for sets that keep their order.
    positives: dict[int, None] = field(default_factory=dict)
    negatives: dict[int, None] = field(default_factory=dict)
    margins: dict[int, float] = field(default_factory=dict)


class _Texts:
    """Unites queries and passages that come in several rows."""

    def __init__(self, instruction: str | None, oddities: Counter[str]) -> None:
        """Begin without texts.

        Args:
            instruction: of examples without their own.
            oddities: takes the numbers of what is united or left out, by its description.
        """
        self._instruction = instruction
        self._oddities = oddities
        self._passages: list[str] = []
        self._positions: dict[str, int] = {}
        self._queries: dict[tuple[str, str | None], _United] = {}

    def add(self, example: Example) -> None:
        """Take what a row says."""
        instruction = example.instruction or self._instruction
        query_key = (example.query.strip(), instruction)
        if not query_key[0]:
            self._oddities["blank queries"] += 1
            return
        self._oddities["rows united with an earlier row of the same query"] += query_key in self._queries
        united = self._queries.setdefault(query_key, _United(example.query, instruction))
        for passages, known in ((example.positives, united.positives), (example.negatives, united.negatives)):
            for passage in passages:
                position = self._position(passage)
                if position is not None:
                    self._oddities["passages that the query had already"] += position in known
                    known[position] = None
        for passage, margin in example.margins:
            if passage.strip():
                united.margins.setdefault(self._positions[passage.strip()], margin)

    def add_collection(self, collection: Collection) -> None:
        """Take a BEIR folder with all its passages; it has counted the blank ones itself."""
        kept = {passage_id: text for passage_id, text in collection.passages.items() if text.strip()}
        for text in kept.values():
            n_known = len(self._passages)
            self._oddities["passages with the same text as an earlier one"] += self._position(text) != n_known
        for query_id, text in collection.queries.items():
            if text.strip():
                relevant = [kept[p] for p, grade in collection.qrels[query_id].items() if grade > 0 and p in kept]
                self.add(Example.model_construct(query=text, positives=relevant))

    def finish(self, name: str) -> TrainingSet:
        """Return the queries that have a passage which answers them, and all passages."""
        queries = []
        for united in self._queries.values():
            if not united.positives:
                self._oddities["queries dropped because they have no positive"] += 1
                continue
            negatives = tuple(position for position in united.negatives if position not in united.positives)
            n_both = len(united.negatives) - len(negatives)
            self._oddities["negatives dropped because they are positives of the same query"] += n_both
            queries.append(Query(united.text, united.instruction, tuple(united.positives), negatives, united.margins))
        margins = [margin for query in queries for margin in query.margins.values()]
        if all(0 <= margin <= 1 for margin in margins):
            self._oddities["teacher's scores, all from 0 to 1, which is unlikely for margins"] += len(margins)
        return TrainingSet(name, self._passages, queries, len(queries))

    def _position(self, passage: str) -> int | None:
        """Return the position of a passage, which is new or known; None if it is blank."""
        key = passage.strip()
        if not key:
            self._oddities["blank passages"] += 1
            return None
        position = self._positions.setdefault(key, len(self._passages))
        if position == len(self._passages):
            self._passages.append(passage)
        return position


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
