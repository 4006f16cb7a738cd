"""A reranker under mteb's cross-encoder protocol, so that `mteb.evaluate` measures it on mteb's reranking tasks."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from kalm_integrations.core.reranker import as_reranker
from kalm_integrations.core.types import Reranker
from kalm_integrations.errors import MissingExtraError

if TYPE_CHECKING:
    from mteb.models.model_meta import ModelMeta


class MtebReranker:
    """Scores the pairs of an mteb task, encoding each passage once.

    The scores are those of mteb's own `KaLMRerankerWrapper`, which encodes a passage anew for every pair.

    ```python
    mteb.evaluate(MtebReranker("nano"), mteb.get_task("AskUbuntuDupQuestions"))
    ```
    """

    def __init__(
        self,
        model: Reranker | str | os.PathLike[str] = "pico",
        revision: str | None = None,
        device: str | None = None,
        **settings: Any,
    ) -> None:
        """Open a checkpoint, or take a reranker that is open.

        Args:
            model: an alias, a hub id, a folder, or a reranker.
            revision: see `KalmReranker.from_pretrained`.
            device: see there.
            **settings: see there. mteb files results under them.

        Raises:
            MissingExtraError: mteb is not installed.
            SettingsError: a setting is out of range or unknown, or `model` is a reranker that has its own.
            CheckpointError: the checkpoint is not there or cannot be used.
        """
        try:
            from mteb.models.model_meta import ModelMeta
        except ImportError as error:
            msg = "mteb's tasks need mteb; install it with: pip install mteb"
            raise MissingExtraError(msg) from error
        self.reranker = as_reranker(model, revision=revision, device=device, **settings)
        name = Path(model).name if isinstance(model, (str, os.PathLike)) else type(model).__name__
        facts = {
            "name": f"kalm-integrations/{name}",
            # Results of other weights, or of other encoder settings, are filed apart.
            "revision": self.reranker.fingerprint,
            "experiment_kwargs": settings or None,
            "model_type": ["cross-encoder"],
        }
        self._meta = ModelMeta.create_empty(overwrites=facts)

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """Under which name and revision mteb files results."""
        return self._meta

    def predict(
        self,
        inputs1: Iterable[dict[str, Any]],
        inputs2: Iterable[dict[str, Any]],
        *,
        show_progress_bar: bool = False,
        **task: Any,
    ) -> np.ndarray:
        """Score pairs.

        Args:
            inputs1: batches with the query of each pair as "text", and with its "instruction" if the task has them.
            inputs2: batches with the passage of each pair as "text".
            show_progress_bar: draw a progress bar.
            **task: what mteb says about the task, and its batch size; not used.

        Returns:
            P(yes) in the order of the pairs. Shape: (pairs,).

        Raises:
            NonFiniteScoreError: the model produced NaN or infinite logits.
        """
        del task
        passages = [text for batch in inputs2 for text in batch["text"]]
        queries: list[tuple[str, str | None]] = []
        for batch in inputs1:
            queries.extend(zip(batch["text"], batch.get("instruction", [None] * len(batch["text"])), strict=True))
        by_query: dict[tuple[str, str | None], list[int]] = {}
        for index, (query, _) in enumerate(zip(queries, passages, strict=True)):
            by_query.setdefault(query, []).append(index)
        scores = np.empty(len(passages))
        for (text, instruction), indices in tqdm(by_query.items(), "Scoring", unit="query", disable=not show_progress_bar):
            scores[indices] = self.reranker.score(text, [passages[index] for index in indices], instruction)
        return scores
