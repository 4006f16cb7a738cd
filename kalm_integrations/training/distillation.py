"""A teacher made of BM25 and a bi-encoder, weighed so that the two find the gold passages together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kalm_integrations.corpora.bm25 import BM25
from kalm_integrations.corpora.peers import embed, load_bi_encoder
from kalm_integrations.files import written_beside
from kalm_integrations.training.config import TeacherConfig
from kalm_integrations.training.sources import TrainingSet

logger = logging.getLogger(__name__)


class ClusterTeacher:
    """BM25 and a bi-encoder, weighed, on the queries and passages of one training set."""

    def __init__(self, texts: TrainingSet, passages: torch.Tensor, queries: torch.Tensor) -> None:
        """Take the embeddings of all passages (passages, width) and of all queries (queries, width)."""
        self._texts = texts
        self._bm25 = BM25(texts.passages)
        self._passages = passages
        self._queries = queries
        self._weights = (0.0, 0.0)

    def features(self, query: int, positions: Sequence[int]) -> list[tuple[float, float]]:
        """Return BM25 score and cosine of passages for a query."""
        lexical = self._bm25.scores(self._texts.queries[query].text, positions)
        cosines = (self._passages[list(positions)].float() @ self._queries[query].float()).tolist()
        return list(zip(lexical, cosines, strict=True))

    def use(self, weights: tuple[float, float]) -> None:
        """Set the weights of BM25 and of the cosine."""
        self._weights = weights

    def margins(self, query: int, positions: Sequence[int]) -> list[float]:
        """Return the weighted sums for passages of a query; only their differences mean something."""
        lexical_weight, cosine_weight = self._weights
        return [lexical_weight * a + cosine_weight * b for a, b in self.features(query, positions)]


def embed_training_set(texts: TrainingSet, config: TeacherConfig, folder: Path, *, bf16: bool) -> ClusterTeacher:
    """Embed a training set, or read what an earlier call left in `folder`."""
    path = folder / f"{texts.name}.safetensors"
    if not path.is_file():
        logger.info("embedding %s with %s", texts.name, config.bi_encoder)
        model = load_bi_encoder(config.bi_encoder)
        if config.max_tokens is not None:
            model.max_seq_length = config.max_tokens
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            embeddings = {
                "passages": embed(model, texts.passages, "passage").half(),
                "queries": embed(model, [query.text for query in texts.queries], "query").half(),
            }
        folder.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as part:
            save_file(embeddings, part)
    return ClusterTeacher(texts, **load_file(path))


def fit_conditional_logit(features: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Return the weights under which the softmax over a query's candidates gives the gold ones the highest likelihood.

    Args:
        features: two of each candidate of a query, the gold one first. Shape of each: (candidates, 2).
    """
    padded = torch.nn.utils.rnn.pad_sequence([f.double() for f in features], batch_first=True, padding_value=float("nan"))
    is_candidate = padded[..., 0].isfinite()
    # Scaled to one size, so that one step length fits both.
    scale = padded[is_candidate].std(0).clamp(min=1e-6)
    scaled = (padded / scale).nan_to_num()
    weights = torch.zeros(2, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = (scaled @ weights).masked_fill(~is_candidate, float("-inf"))
        # A trace of decay keeps the weights finite where the candidates can be told apart without error.
        loss = -logits.log_softmax(1)[:, 0].mean() + 1e-4 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    lexical, cosine = (weights.detach() / scale).tolist()
    return lexical, cosine
