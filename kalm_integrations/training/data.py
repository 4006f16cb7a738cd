"""Clusters: passages that share their queries' negatives, and batches of them."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from kalm_integrations.core.checkpoint.tokenization import n_shared
from kalm_integrations.core.passes import pad_token_ids
from kalm_integrations.corpora.bm25 import BM25
from kalm_integrations.errors import SettingsError
from kalm_integrations.training.config import PhaseConfig
from kalm_integrations.training.distillation import ClusterTeacher, fit_conditional_logit
from kalm_integrations.training.pairs import PairTokenizer
from kalm_integrations.training.sources import TrainingSet

logger = logging.getLogger(__name__)

N_NEIGHBOURS = 19
"""Hard negatives kept per passage: with the passage itself, BM25's top 20, the list a reranker is given."""

QUERIES_PER_BLOCK = 256
"""Queries that neighbours are searched for at a time."""

N_FITTED = 1500
"""Queries that the weights of a teacher are fitted on."""

FITTED_CANDIDATES = 10
"""Passages of each, the gold one included."""

Start = tuple[Literal["query", "passage"], int]
"""What a cluster begins with: a query that brings its negatives, or a passage that has neighbours."""


Item = TypeVar("Item")


@dataclass(frozen=True)
class Source:
    """A training set with the neighbours that make its clusters."""

    texts: TrainingSet
    questions: list[list[int]]
    """Real queries without negatives of their own, by the passage that answers them."""
    pseudo_questions: list[list[int]]
    """Queries made of each passage."""
    neighbours: dict[int, list[int]]
    """Of each passage that has a question, the passages nearest to the first one by BM25, without those that answer it."""
    grouped: list[int]
    """Queries that bring their negatives."""
    teacher: ClusterTeacher | None = None

    @classmethod
    def build(cls, texts: TrainingSet, seed: int) -> Source:
        """Sort a set's queries and find the neighbours of each passage that has a question."""
        questions: list[list[int]] = [[] for _ in texts.passages]
        pseudo: list[list[int]] = [[] for _ in texts.passages]
        for index, query in enumerate(texts.queries):
            if not query.negatives:
                for position in query.positives:
                    (questions if index < texts.n_real else pseudo)[position].append(index)
        generator = random.Random(seed)
        for passage_questions in questions:
            generator.shuffle(passage_questions)
        asked = [position for position, passage_questions in enumerate(questions) if passage_questions]
        neighbours = {}
        if asked:
            bm25 = BM25(texts.passages)
            for start in range(0, len(asked), QUERIES_PER_BLOCK):
                block = asked[start : start + QUERIES_PER_BLOCK]
                first = [texts.queries[questions[position][0]] for position in block]
                # Positives come off.
                n_found = N_NEIGHBOURS + max(len(query.positives) for query in first)
                found = bm25.search([query.text for query in first], n_found)
                for position, query, (near, _) in zip(block, first, found, strict=True):
                    positives = set(query.positives)
                    neighbours[position] = [other for other in near if other not in positives][:N_NEIGHBOURS]
        grouped = [index for index, query in enumerate(texts.queries) if query.negatives]
        return cls(texts, questions, pseudo, neighbours, grouped)

    @property
    def examples(self) -> list[Start]:
        """What a cluster can begin with."""
        by_query: list[Start] = [("query", index) for index in self.grouped]
        return [*by_query, *(("passage", position) for position, near in self.neighbours.items() if near)]


def fit_teachers(sources: Sequence[Source], weights: Sequence[float | None], seed: int) -> None:
    """Fit the weights of BM25 and cosine on all sources together, and have their teachers use them.

    Args:
        sources: with teachers.
        weights: shares of the sources; None: by their numbers of examples.
        seed: of the sample of queries.

    Raises:
        SettingsError: all queries bring negatives of their own.
    """
    generator = random.Random(seed)
    usable = {i: [p for p, near in source.neighbours.items() if near] for i, source in enumerate(sources)}
    usable = {i: passages for i, passages in usable.items() if passages}
    if not usable:
        msg = "a teacher is for queries without negatives of their own, but no collection has any; leave out [teacher]"
        raise SettingsError(msg)
    shares = [weights[i] or len(passages) for i, passages in usable.items()]
    features = []
    for i in generator.choices(list(usable), shares, k=N_FITTED):
        source, start = sources[i], generator.choice(usable[i])
        query = generator.choice(source.questions[start])
        others = [p for p in source.neighbours[start] if p not in source.texts.queries[query].positives]
        others = generator.sample(others, min(len(others), FITTED_CANDIDATES - 1))
        if source.teacher is not None:
            features.append(torch.tensor(source.teacher.features(query, [start, *others])))
    fitted = fit_conditional_logit(features)
    logger.info("teacher: %.4f x BM25 + %.3f x cosine, fitted on %d queries", *fitted, len(features))
    for source in sources:
        if source.teacher is not None:
            source.teacher.use(fitted)


@dataclass(frozen=True)
class Cluster:
    """Passages and the prompts that are scored against them."""

    index: int
    passages: list[list[int]]
    prompts: list[list[int]]
    candidates: list[list[int]]
    """Positions of the passages that each prompt is scored against, the gold one first."""
    margins: list[list[float] | None]
    """A teacher's, of each prompt's candidates."""


class ClusterDataset(Dataset[Cluster]):
    """The clusters of a phase, each drawn from its own seed, so that a resumed run sees what the first one would have seen.

    Examples are gone through in shuffled order, and again in another one after the last: all together, or with weights those
    of each collection.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float | None],
        tokenizer: PairTokenizer,
        phase: PhaseConfig,
        clusters_per_step: int,
        seed: int,
        pseudo_rate: float = 0.0,
    ) -> None:
        """Plan which example each cluster begins with.

        Args:
            sources: where clusters come from.
            weights: shares of the sources; None: by their numbers of examples.
            tokenizer: the checkpoint's, with the limits of the phase.
            phase: sizes.
            clusters_per_step: of all devices together.
            seed: the same seed gives the same clusters.
            pseudo_rate: how often a query made of the passage takes the place of a real one.

        Raises:
            SettingsError: a source gives no cluster, or lacks a teacher's margins that the loss needs.
        """
        self._sources = sources
        self._tokenizer = tokenizer
        self._phase = phase
        self._seed = seed
        self._pseudo_rate = pseudo_rate
        self.n_examples = sum(len(source.examples) for source in sources)
        self.n_steps = phase.steps or math.ceil((phase.epochs or 1) * self.n_examples / clusters_per_step)
        self._plan = _plan(sources, weights, self.n_steps * clusters_per_step, random.Random(seed))
        if phase.losses.distillation:
            for source in sources:
                _check_margins(source)

    def __len__(self) -> int:
        """Return the number of clusters."""
        return len(self._plan)

    def __getitem__(self, index: int) -> Cluster:
        """Draw the passages and queries of a cluster."""
        generator = random.Random(f"{self._seed}:{index}")
        which, (kind, start) = self._plan[index]
        source = self._sources[which]
        members, asked = self._group(source, start, generator) if kind == "query" else self._cluster(source, start, generator)
        candidates = []
        margins: list[list[float] | None] = []
        for query_index, gold in asked:
            query = source.texts.queries[query_index]
            others = [m for m in range(len(members)) if m != gold and members[m] not in query.positives]
            candidates.append([gold, *others])
            positions = [members[m] for m in candidates[-1]]
            if all(position in query.margins for position in positions):
                margins.append([query.margins[position] for position in positions])
            else:
                margins.append(source.teacher.margins(query_index, positions) if source.teacher else None)
        return Cluster(
            index,
            passages=self._tokenizer.passages([source.texts.passages[m] for m in members]),
            prompts=[self._tokenizer.prompt(q.text, q.instruction) for q in (source.texts.queries[i] for i, _ in asked)],
            candidates=candidates,
            margins=margins,
        )

    def _group(self, source: Source, index: int, generator: random.Random) -> tuple[list[int], list[tuple[int, int]]]:
        """Return a query's members, one positive and negatives, and the query with the position of its gold passage."""
        query = source.texts.queries[index]
        n_negatives = min(len(query.negatives), self._phase.passages_per_cluster - 1)
        members = [generator.choice(query.positives), *generator.sample(query.negatives, n_negatives)]
        return members, [(index, 0)]

    def _cluster(self, source: Source, start: int, generator: random.Random) -> tuple[list[int], list[tuple[int, int]]]:
        """Return a passage with neighbours, and the queries that are asked with the positions of their gold passages."""
        phase = self._phase
        near = source.neighbours[start]
        members = [start, *generator.sample(near, min(len(near), phase.passages_per_cluster - 1))]
        if phase.grouped:
            return members, [(index, 0) for index in self._draw(source, start, 1, generator)]
        return members, [
            (index, gold)
            for gold, member in enumerate(members)
            for index in self._draw(source, member, phase.queries_per_passage, generator)
        ]

    def _draw(self, source: Source, position: int, n_queries: int, generator: random.Random) -> list[int]:
        """Draw queries of a passage; those made of it take the place of some, and fill up what is missing."""
        real, pseudo = source.questions[position], source.pseudo_questions[position]
        drawn = generator.sample(real, min(len(real), n_queries))
        spare = generator.sample(pseudo, len(pseudo))
        drawn = [spare.pop() if spare and generator.random() < self._pseudo_rate else index for index in drawn]
        return [*drawn, *spare[: n_queries - len(drawn)]]


@dataclass(frozen=True)
class Collator:
    """Makes the arguments of `TrainableReranker.forward` of clusters."""

    phase: PhaseConfig
    seed: int

    def __call__(self, clusters: Sequence[Cluster]) -> dict[str, object]:
        """Put clusters together; the tokens that all prompts begin with are taken out of them."""
        all_prompts = [prompt for cluster in clusters for prompt in cluster.prompts]
        # One token at least is left to each prompt.
        n_prefix = min(n_shared(min(all_prompts), max(all_prompts)), min(map(len, all_prompts)) - 1)
        rests = [prompt[n_prefix:] for prompt in all_prompts]
        passages = [passage for cluster in clusters for passage in cluster.passages]
        rows, margins = [], []
        offset = 0
        for cluster in clusters:
            for candidates, taught in zip(cluster.candidates, cluster.margins, strict=True):
                rows.append(torch.tensor(candidates) + offset)
                margins.append(torch.tensor(taught or [float("nan")] * len(candidates)))
            offset += len(cluster.passages)
        ratios = self.phase.compression_ratios
        if self.phase.ratios_per_step == "one":
            # By the clusters' first index, which stays the same when a run goes on.
            ratios = (random.Random(f"{self.seed}:ratio:{clusters[0].index}").choice(ratios),)
        return {
            "passages": pad_token_ids(passages),
            "n_tokens": torch.tensor([len(passage) for passage in passages]),
            "prefix": torch.tensor(all_prompts[0][:n_prefix]),
            "queries": pad_token_ids(rests),
            "last": torch.tensor([len(rest) - 1 for rest in rests]),
            "candidates": pad_sequence(rows, batch_first=True, padding_value=-1),
            "teacher": pad_sequence(margins, batch_first=True, padding_value=float("nan")),
            "compression_ratios": ratios,
        }


def _plan(
    sources: Sequence[Source], weights: Sequence[float | None], n_clusters: int, generator: random.Random
) -> list[tuple[int, Start]]:
    """Return for each cluster its source and the example it begins with."""
    examples = [source.examples for source in sources]
    for source, own in zip(sources, examples, strict=True):
        if not own:
            msg = (
                "a collection must hold a query with negatives, or passages that lexical neighbours can be found for, "
                f"but {source.texts.name!r} gives no cluster; add passages or negatives"
            )
            raise SettingsError(msg)
    if all(weight is None for weight in weights):
        together = [(which, start) for which, own in enumerate(examples) for start in own]
        return list(islice(_shuffled_forever(together, generator), n_clusters))
    drawn = generator.choices(range(len(sources)), [weight or 0.0 for weight in weights], k=n_clusters)
    orders = [_shuffled_forever(own, generator) for own in examples]
    return [(which, next(orders[which])) for which in drawn]


def _shuffled_forever(examples: Sequence[Item], generator: random.Random) -> Iterator[Item]:
    while True:
        yield from generator.sample(examples, len(examples))


def _check_margins(source: Source) -> None:
    queries = source.texts.queries
    n_without = sum(not query.negatives or query.margins.keys() != {*query.positives, *query.negatives} for query in queries)
    if n_without:
        msg = (
            "the loss `distillation` needs negatives and a teacher's margins (positive_scores and negative_scores) for every "
            f"query, but {n_without:,} of {len(queries):,} queries of {source.texts.name!r} have none; make them with "
            "`kalm mine --teacher`"
        )
        raise SettingsError(msg)
