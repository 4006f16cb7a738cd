"""The dev collection of a run: how well its queries' candidates are ranked by the weights as they are."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch

from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.first_stage import BM25_NAME, Candidates, find_candidates, first_stage_name, order
from kalm_integrations.corpora.measures import ndcg_at_10
from kalm_integrations.training.config import CollectionConfig, DevConfig, PhaseConfig
from kalm_integrations.training.data import Cluster, Collator
from kalm_integrations.training.model import TrainableReranker
from kalm_integrations.training.output import hash_data
from kalm_integrations.training.pairs import PairTokenizer
from kalm_integrations.training.sources import TrainingSet, read_training_set

logger = logging.getLogger(__name__)

SEED = 0
"""Of the draw of queries: the same for every run, so that runs can be compared."""

QUERIES_PER_BATCH = 4


@dataclass(frozen=True)
class DevSet:
    """Queries with their candidates and judgements."""

    collection: Collection
    candidates: Mapping[str, Candidates]
    instructions: Mapping[str, str]
    """By query id, of queries that bring one."""
    compression_ratio: int

    def hash(self) -> str:
        """Return a SHA-256 of all that it is made of."""
        asked = ((query_id, found, self.collection.qrels[query_id]) for query_id, found in self.candidates.items())
        ids = dict.fromkeys(passage_id for found in self.candidates.values() for passage_id in found.ids)
        passages = (self.collection.passages[passage_id] for passage_id in ids)
        return hash_data(asked, passages, sorted(self.instructions.items()))

    def mean_ndcg(self, rankings: Mapping[str, Sequence[str]]) -> float:
        """Return the mean nDCG@10 of rankings of passage ids."""
        return fmean(ndcg_at_10(self.collection.qrels, rankings).values())

    def evaluate(
        self, model: TrainableReranker, tokenizer: PairTokenizer, *, bf16: bool, part: int = 0, n_parts: int = 1
    ) -> float:
        """Return the mean nDCG@10 of the candidates in the order of a model's margins.

        Args:
            model: as it is.
            tokenizer: of its checkpoint, with the limits that hold in use.
            bf16: compute in bfloat16.
            part: which share of the queries this process scores.
            n_parts: how many processes there are; all of them return the same value.
        """
        share = list(self.candidates)[part::n_parts]
        device = next(model.parameters()).device
        collate = Collator(PhaseConfig(steps=1, compression_ratios=(self.compression_ratio,), ratios_per_step="all"), SEED)
        margins: list[tuple[str, list[float]]] = []
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            for start in range(0, len(share), QUERIES_PER_BATCH):
                query_ids = share[start : start + QUERIES_PER_BATCH]
                batch = collate([self._cluster(index, query_id, tokenizer) for index, query_id in enumerate(query_ids)])
                del batch["teacher"]
                tensors: dict[str, Any] = {
                    name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in batch.items()
                }
                for query_id, row in zip(query_ids, model.score(**tensors)[0].tolist(), strict=True):
                    margins.append((query_id, row[: len(self.candidates[query_id].ids)]))
        if n_parts > 1:
            from accelerate.utils import gather_object

            margins = gather_object(margins)
        scores = dict(margins)
        return self.mean_ndcg({query_id: order(found.ids, scores[query_id]) for query_id, found in self.candidates.items()})

    def _cluster(self, index: int, query_id: str, tokenizer: PairTokenizer) -> Cluster:
        found = self.candidates[query_id]
        return Cluster(
            index,
            passages=tokenizer.passages([self.collection.passages[passage_id] for passage_id in found.ids]),
            prompts=[tokenizer.prompt(found.query, self.instructions.get(query_id))],
            candidates=[list(range(len(found.ids)))],
            margins=[None],
        )


def read_dev_set(config: DevConfig) -> DevSet:
    """Read the dev collection, and find its queries' candidates.

    Raises:
        SettingsError: it cannot be read, or holds no judged query.
        MissingExtraError: ir-measures is not installed, or what the first stage needs.
    """
    listed: dict[str, Candidates] = {}
    if (config.path / "corpus.jsonl").is_file():
        collection, first_stage = Collection.read(config.path, config.split), config.first_stage
        instructions = {} if config.instruction is None else dict.fromkeys(collection.queries, config.instruction)
    else:
        texts = read_training_set(CollectionConfig(path=config.path, split=config.split, instruction=config.instruction))
        collection, listed, instructions = _from_training_set(texts)
        first_stage = BM25_NAME
    drawn = sorted(collection.queries)
    if len(drawn) > config.queries:
        drawn = random.Random(SEED).sample(drawn, config.queries)
    candidates = {query_id: listed[query_id] for query_id in drawn if query_id in listed}
    searched = {query_id: collection.queries[query_id] for query_id in drawn if query_id not in listed}
    if searched or not drawn:
        candidates |= find_candidates(replace(collection, queries=searched), first_stage, config.top_k)
    dev = DevSet(collection, candidates, instructions, config.compression_ratio)
    name = "its own lists" if listed else first_stage_name(first_stage)
    # Also a check, before any training, that ir-measures is there.
    ndcg = dev.mean_ndcg({query_id: found.ids for query_id, found in candidates.items()})
    logger.info("dev: %s, %d queries, nDCG@10 %.4f in the order of %s", collection.name, len(candidates), ndcg, name)
    return dev


def _from_training_set(texts: TrainingSet) -> tuple[Collection, dict[str, Candidates], dict[str, str]]:
    """Return a training set as a collection, the candidates of queries that bring negatives, and the instructions."""
    queries = {str(index): query for index, query in enumerate(texts.queries)}
    collection = Collection(
        texts.name,
        {str(position): text for position, text in enumerate(texts.passages)},
        {query_id: query.text for query_id, query in queries.items()},
        {query_id: {str(position): 1 for position in query.positives} for query_id, query in queries.items()},
    )
    listed: dict[str, Candidates] = {}
    for query_id, query in queries.items():
        if query.negatives:
            # Positives last: a model that tells nothing apart shall not look good.
            ids = [str(position) for position in (*query.negatives, *query.positives)]
            listed[query_id] = Candidates(query.text, ids, [0.0] * len(ids))
    return collection, listed, {i: query.instruction for i, query in queries.items() if query.instruction is not None}
