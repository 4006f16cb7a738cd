"""Other rerankers and retrievers, by sentence-transformers: first stages, teachers, and what a reranker is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from kalm_integrations.corpora.runs import Run
from kalm_integrations.errors import MissingExtraError, SettingsError

if TYPE_CHECKING:
    import torch
    from sentence_transformers import CrossEncoder, SentenceTransformer

QUERIES_PER_BLOCK = 256
"""Queries whose similarities to all passages are in memory at a time."""


def load_bi_encoder(model: str) -> SentenceTransformer:
    """Load a bi-encoder of sentence-transformers, a folder or a hub id.

    Raises:
        MissingExtraError: sentence-transformers is not installed.
        SettingsError: the model cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise _missing() from error
    try:
        return SentenceTransformer(model)
    except (OSError, ValueError) as error:
        msg = f"a bi-encoder must be a folder or a hub id of a sentence-transformers model, but {model!r} is not: {error}"
        raise SettingsError(msg) from error


def load_cross_encoder(model: str) -> CrossEncoder:
    """Load a cross-encoder of sentence-transformers with one output, a folder or a hub id; it gives margins.

    Raises:
        MissingExtraError: sentence-transformers is not installed.
        SettingsError: the model cannot be loaded, or has several outputs.
    """
    try:
        from sentence_transformers import CrossEncoder
    except ImportError as error:
        raise _missing() from error
    import torch

    try:
        loaded: CrossEncoder = CrossEncoder(model, activation_fn=torch.nn.Identity())
    except (OSError, ValueError) as error:
        msg = f"a cross-encoder must be a folder or a hub id of a sentence-transformers model, but {model!r} is not: {error}"
        raise SettingsError(msg) from error
    if loaded.num_labels != 1:
        msg = f"a cross-encoder must have one output, the margin, but {model!r} has {loaded.num_labels}"
        raise SettingsError(msg)
    return loaded


def embed(model: SentenceTransformer, texts: Sequence[str], kind: Literal["query", "passage"]) -> torch.Tensor:
    """Return unit embeddings in float32, on the CPU. Shape: (texts, width)."""
    encode = model.encode_query if kind == "query" else model.encode_document
    embeddings = encode(list(texts), normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False)
    return embeddings.float().cpu()


def search(model: str, passages: Mapping[str, str], queries: Mapping[str, str], k: int) -> Run:
    """Return for each query the `k` passages that a bi-encoder finds nearest, by cosine, best first.

    Args:
        model: see `load_bi_encoder`.
        passages: text by id; all of them are embedded.
        queries: text by id.
        k: passages per query at most.
    """
    import torch

    encoder = load_bi_encoder(model)
    ids, query_ids = list(passages), list(queries)
    embeddings = embed(encoder, list(passages.values()), "passage")
    asked = embed(encoder, list(queries.values()), "query")
    run: Run = {}
    for start in range(0, len(query_ids), QUERIES_PER_BLOCK):
        scores, indices = torch.topk(asked[start : start + QUERIES_PER_BLOCK] @ embeddings.T, min(k, len(ids)))
        for query_id, row, places in zip(query_ids[start:], scores.tolist(), indices.tolist(), strict=False):
            run[query_id] = [(ids[place], score) for place, score in zip(places, row, strict=True)]
    return run


def score_by_cross_encoder(model: str, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Return the margin that a cross-encoder gives each (query, passage)."""
    return [float(margin) for margin in load_cross_encoder(model).predict(list(pairs), show_progress_bar=False)]


def score_by_bi_encoder(model: str, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Return the cosine that a bi-encoder gives each (query, passage); each text is embedded once."""
    encoder = load_bi_encoder(model)
    queries = list(dict.fromkeys(query for query, _ in pairs))
    passages = list(dict.fromkeys(passage for _, passage in pairs))
    asked = dict(zip(queries, embed(encoder, queries, "query"), strict=True))
    known = dict(zip(passages, embed(encoder, passages, "passage"), strict=True))
    return [float(asked[query] @ known[passage]) for query, passage in pairs]


def _missing() -> MissingExtraError:
    return MissingExtraError(
        'a peer needs sentence-transformers; install it with: pip install "kalm-integrations[sentence-transformers]"'
    )
