"""Clusters: neighbouring passages that share their questions' negatives, encoded once per step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from kalm_integrations.core import prompts
from kalm_integrations.core.runtime import pad_token_ids
from kalm_integrations.core.tokenization import PromptTokenizer
from kalm_integrations.evaluation.beir import Collection
from kalm_integrations.evaluation.first_stage import BM25
from kalm_integrations.training.config import PhaseConfig


@dataclass(frozen=True)
class TokenizedCollection:
    """A collection as token ids, with the lexical neighbours that make hard negatives."""

    passages: list[list[int]]
    queries: list[list[list[int]]]
    """Queries (rest of the prompt after the prefix) of each passage that have it as a relevant one."""
    neighbours: list[list[int]]
    """Passages nearest to each passage's first query by BM25, itself excluded; empty if it has no query."""

    @classmethod
    def build(cls, collection: Collection, tokenizer: PromptTokenizer, n_neighbours: int, seed: int) -> TokenizedCollection:
        """Tokenise a collection and find the neighbours of each passage that has a query."""
        ids = list(collection.passages)
        texts = list(collection.passages.values())
        position = {passage_id: i for i, passage_id in enumerate(ids)}
        questions: list[list[str]] = [[] for _ in ids]
        for query_id, judged in collection.qrels.items():
            for passage_id, grade in judged.items():
                if grade > 0 and passage_id in position:
                    questions[position[passage_id]].append(collection.queries[query_id])
        generator = random.Random(seed)
        for passage_questions in questions:
            generator.shuffle(passage_questions)
        seeds = [i for i, passage_questions in enumerate(questions) if passage_questions]
        found = BM25(texts).search([questions[i][0] for i in seeds], k=n_neighbours + 1)
        neighbours: list[list[int]] = [[] for _ in ids]
        for i, (indices, _) in zip(seeds, found, strict=True):
            neighbours[i] = [j for j in indices if j != i][:n_neighbours]
        prefix = len(prompt_prefix(tokenizer))
        return cls(
            passages=tokenizer.passages([prompts.passage_text(text) for text in texts]),
            queries=[
                [tokenizer.prompt(prompts.SYSTEM_INSTRUCTION, prompts.INSTRUCTION, q)[prefix:] for q in passage_questions]
                for passage_questions in questions
            ],
            neighbours=neighbours,
        )


def prompt_prefix(tokenizer: PromptTokenizer) -> list[int]:
    """Return the prompt's tokens up to the query, the same for every query under the default instruction."""
    parts = (prompts.SYSTEM_INSTRUCTION, prompts.INSTRUCTION)
    one, other = tokenizer.prompt(*parts, "which"), tokenizer.prompt(*parts, "42")
    shared = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[:shared]


class ClusterDataset(Dataset[dict[str, object]]):
    """Steps of a phase, each drawn from its own seed, so that a resumed run sees what the first one would have seen."""

    def __init__(
        self,
        collections: Sequence[TokenizedCollection],
        weights: Sequence[float],
        prefix: list[int],
        phase: PhaseConfig,
        seed: int,
    ) -> None:
        """Draw clusters from collections in proportion to `weights`."""
        self._collections = collections
        self._weights = weights
        self._prefix = torch.tensor(prefix)
        self._phase = phase
        self._seed = seed
        self._seeds = [[i for i, near in enumerate(c.neighbours) if near] for c in collections]

    def __len__(self) -> int:
        """Return the number of steps."""
        return self._phase.steps

    def __getitem__(self, step: int) -> dict[str, object]:
        """Return the arguments of `TrainableReranker.forward` for a step."""
        generator = random.Random(f"{self._seed}:{step}")
        phase = self._phase
        passages: list[list[int]] = []
        queries: list[list[tuple[list[int], int]]] = []
        for _ in range(phase.clusters_per_step):
            cluster_passages, cluster_queries = self._cluster(generator)
            passages += cluster_passages
            queries.append(cluster_queries)
        n_queries = max(len(cluster) for cluster in queries)
        # A short cluster repeats its queries, so that every row of the batch is real.
        queries = [[cluster[i % len(cluster)] for i in range(n_queries)] for cluster in queries]
        return {
            "passages": pad_token_ids(passages),
            "n_tokens": torch.tensor([len(p) for p in passages]),
            "prefix": self._prefix,
            "queries": pad_token_ids([ids for cluster in queries for ids, _ in cluster]).view(len(queries), n_queries, -1),
            "last": torch.tensor([[len(ids) - 1 for ids, _ in cluster] for cluster in queries]),
            "relevant": torch.tensor([[index for _, index in cluster] for cluster in queries]),
            "compression_ratio": generator.choice(phase.compression_ratios),
        }

    def _cluster(self, generator: random.Random) -> tuple[list[list[int]], list[tuple[list[int], int]]]:
        which = generator.choices(range(len(self._collections)), self._weights)[0]
        collection, phase = self._collections[which], self._phase
        seed = generator.choice(self._seeds[which])
        near = collection.neighbours[seed]
        members = [seed, *generator.sample(near, min(len(near), phase.passages_per_cluster - 1))]
        queries = [
            (query, position)
            for position, member in enumerate(members)
            for query in _draw(collection.queries[member], phase, generator)
        ]
        return [collection.passages[m][: phase.max_passage_tokens] for m in members], queries


def _draw(queries: list[list[int]], phase: PhaseConfig, generator: random.Random) -> list[list[int]]:
    short = [query for query in queries if len(query) <= phase.max_query_tokens]
    return generator.sample(short, min(len(short), phase.queries_per_passage))
