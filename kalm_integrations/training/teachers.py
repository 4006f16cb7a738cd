"""Teachers: the margins of other models, as labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from kalm_integrations.core.reranker import KalmReranker
from kalm_integrations.corpora.peers import embed, load_bi_encoder, load_cross_encoder

SIMILARITY_SCALE = 20.0
"""What a bi-encoder's cosine is multiplied with to be a margin: the scale that such models are trained with."""

TeacherKind = Literal["kalm", "cross-encoder", "bi-encoder"]

Teacher = Callable[[str, Sequence[str], "str | None"], list[float]]
"""Query, passages and instruction to the margin of each passage."""


def load_teacher(model: str, kind: TeacherKind) -> Teacher:
    """Load a model that gives margins.

    Args:
        model: alias, hub id or folder.
        kind: of the model. The margins of a bi-encoder are its cosines, scaled: they order passages, but say little about
            whether one answers.

    Raises:
        MissingExtraError: sentence-transformers is needed and not installed.
        SettingsError: the model cannot be loaded.
        CheckpointError: a KaLM reranker cannot be used.
    """
    if kind == "kalm":
        # Who learns from the margins is given the beginning of a long passage.
        return _by_reranker(KalmReranker.from_pretrained(model, storage_codec="fp32", long_passages="cut"))
    return _by_cross_encoder(model) if kind == "cross-encoder" else _by_bi_encoder(model)


def _by_reranker(reranker: KalmReranker) -> Teacher:
    def margins(query: str, passages: Sequence[str], instruction: str | None) -> list[float]:
        ranked = reranker.rank(query, list(passages), instruction=instruction)
        return [passage.margin for passage in sorted(ranked, key=lambda passage: passage.index)]

    return margins


def _by_cross_encoder(model: str) -> Teacher:
    cross_encoder = load_cross_encoder(model)

    def margins(query: str, passages: Sequence[str], instruction: str | None) -> list[float]:
        del instruction
        pairs = [(query, passage) for passage in passages]
        return [float(margin) for margin in cross_encoder.predict(pairs, show_progress_bar=False)]

    return margins


def _by_bi_encoder(model: str) -> Teacher:
    bi_encoder = load_bi_encoder(model)
    known: dict[str, torch.Tensor] = {}

    def margins(query: str, passages: Sequence[str], instruction: str | None) -> list[float]:
        del instruction
        new = [passage for passage in dict.fromkeys(passages) if passage not in known]
        if new:
            known.update(zip(new, embed(bi_encoder, new, "passage"), strict=True))
        [own] = embed(bi_encoder, [query], "query")
        return [SIMILARITY_SCALE * float(known[passage] @ own) for passage in passages]

    return margins
