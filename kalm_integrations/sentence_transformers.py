"""A face in the shape of sentence-transformers' `CrossEncoder`, for hosts that take one.

Hosts ask for the shape, not for the class: numpy and the core are all it needs, and sentence-transformers is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from kalm_integrations.core.base import Reranker
from kalm_integrations.core.pairs import score_pairs
from kalm_integrations.core.types import Passage, RankedPassage
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting import as_reranker

if TYPE_CHECKING:
    import torch

Pair = tuple[str, str | Passage]
"""A query and a passage. A `Passage` brings the metadata string of its encoding."""
Activation = Callable[["torch.Tensor"], "torch.Tensor"]
"""Makes scores of margins; has to increase, as torch.nn's Sigmoid and Identity do."""


class KalmCrossEncoder:
    """Scores pairs as a `CrossEncoder` with one label does, encoding each passage once.

    Pairs are grouped by query, and a passage that comes with several queries, or in several calls, is encoded the first time
    only, as long as the reranker's `cache_bytes` hold it.

    ```python
    model = KalmCrossEncoder("pico")
    model.predict([("who won?", "The Panthers won."), ("who lost?", "The Panthers won.")])
    model.rank("who won?", ["Nobody knows.", "The Panthers won."], top_k=1)
    ```
    """

    def __init__(self, model: Reranker | str | os.PathLike[str] = "pico", **settings: Any) -> None:
        """Open a checkpoint, or take a reranker that is open.

        Args:
            model: an alias, a hub id, a folder, the address of a service, or a reranker.
            **settings: of `KalmReranker.from_pretrained`, where `model` is not a reranker.

        Raises:
            SettingsError: a setting is out of range or unknown, or `model` is a reranker that has its own.
            CheckpointError: the checkpoint is not there or cannot be used.
        """
        self.reranker = as_reranker(model, **settings)
        self.model_card_data = _ModelCardData()

    def predict(
        self,
        sentences: Sequence[Pair] | Pair,
        *,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        activation_fn: Activation | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        **unsupported: Any,
    ) -> np.ndarray | np.float32 | torch.Tensor | list[torch.Tensor]:
        """Score pairs of a query and a passage.

        Args:
            sentences: the pairs, or one pair. A list or tuple that starts with a string is one pair.
            prompt: replaces the reranker's instruction for this call.
            batch_size: taken for the sake of hosts that pass it, and not used; the reranker's `encode_batch_size` and
                `score_batch_size` hold.
            show_progress_bar: draw a progress bar over the pairs.
            activation_fn: makes scores of margins, logit(yes) - logit(no), which are what a `CrossEncoder` calls logits; None
                gives P(yes), the sigmoid.
            convert_to_numpy: if False, return a list of tensors without dimensions.
            convert_to_tensor: return one tensor; goes before `convert_to_numpy`.
            **unsupported: arguments of other versions of `CrossEncoder.predict`, which may only be None or False.

        Returns:
            Scores in the order of the pairs, float32, on the CPU. Shape: (pairs,), and () for one pair.

        Raises:
            SettingsError: an element is not a pair, or an argument cannot be honoured.
            NonFiniteScoreError: the model produced NaN or infinite logits.
        """
        del batch_size
        _refuse(unsupported)
        is_single = isinstance(sentences, (list, tuple)) and bool(sentences) and isinstance(sentences[0], str)
        pairs = _checked_pairs([sentences] if is_single else sentences)
        with tqdm(total=len(pairs), desc="Scoring", unit="pair", disable=not show_progress_bar) as progress:
            scores = _scores(score_pairs(self.reranker, pairs, prompt, progress.update), activation_fn)
        if convert_to_tensor or not convert_to_numpy:
            import torch

            tensor = torch.from_numpy(scores)
            if is_single:
                return tensor[0]
            return tensor if convert_to_tensor else list(tensor)
        if is_single:
            return np.float32(scores[0])
        return scores

    def rank(
        self,
        query: str,
        documents: Sequence[str | Passage],
        top_k: int | None = None,
        return_documents: bool = False,
        *,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        activation_fn: Activation | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        **unsupported: Any,
    ) -> list[dict[str, Any]]:
        """Rank documents for a query.

        Args:
            query: the query.
            documents: texts, or passages with their encodings.
            top_k: how many to return at most; None returns all.
            return_documents: return the texts too, as "text".
            prompt: see `predict`.
            batch_size: see `predict`.
            show_progress_bar: not used, as one query is one step.
            activation_fn: see `predict`.
            convert_to_numpy: not used, as in `CrossEncoder.rank`: scores are Python floats.
            convert_to_tensor: not used, either.
            **unsupported: see `predict`.

        Returns:
            For each document, best first: {"corpus_id": position in `documents`, "score": float}. Ties keep their order.

        Raises:
            SettingsError: an argument has the wrong type or cannot be honoured, or `top_k` is not positive.
            NonFiniteScoreError: the model produced NaN or infinite logits.
        """
        del batch_size, show_progress_bar, convert_to_numpy, convert_to_tensor
        _refuse(unsupported)
        documents = list(documents)
        ranked = self.reranker.rank(query, documents, top_k=top_k, instruction=prompt)
        scores = _scores(ranked, activation_fn).tolist()
        results = [{"corpus_id": r.index, "score": score} for r, score in zip(ranked, scores, strict=True)]
        if return_documents:
            for result in results:
                document = documents[result["corpus_id"]]
                result["text"] = document.text if isinstance(document, Passage) else document
        return results


class _ModelCardData:
    """Takes the metrics that sentence-transformers' evaluators hand to a model; there is no card to write them into."""

    def set_evaluation_metrics(self, *arguments: Any) -> None:
        """Do nothing."""


def _scores(scored: Sequence[RankedPassage], activation_fn: Activation | None) -> np.ndarray:
    if activation_fn is None:
        return np.array([passage.score for passage in scored], dtype=np.float32)
    import torch

    margins = torch.tensor([passage.margin for passage in scored], dtype=torch.float32)
    return activation_fn(margins).numpy()


def _checked_pairs(sentences: Any) -> list[Pair]:
    pairs: list[Pair] = []
    for index, pair in enumerate(sentences):
        is_pair = not isinstance(pair, (str, bytes)) and hasattr(pair, "__len__") and len(pair) == 2
        if not is_pair or not isinstance(pair[0], str) or not isinstance(pair[1], (str, Passage)):
            msg = f"sentences must be pairs of a query and a passage, but sentences[{index}] is {pair!r}"
            raise SettingsError(msg)
        pairs.append((pair[0], pair[1]))
    return pairs


def _refuse(unsupported: dict[str, Any]) -> None:
    given = sorted(name for name, value in unsupported.items() if value is not None and value is not False)
    if given:
        msg = (
            f"KalmCrossEncoder cannot honour {', '.join(given)}; leave them out (an instruction goes into prompt=, the device "
            "and batch sizes into the reranker's settings)"
        )
        raise SettingsError(msg)
