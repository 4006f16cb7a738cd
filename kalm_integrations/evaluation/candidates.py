"""Candidates of a first stage, and how a reranker scores them at each ratio and codec."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm.auto import tqdm

from kalm_integrations.core.pairs import score_pairs
from kalm_integrations.core.passages.encoding import EncodedPassage
from kalm_integrations.core.reranker import KalmReranker
from kalm_integrations.core.settings import check_codec
from kalm_integrations.corpora import peers
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.bm25 import BM25
from kalm_integrations.corpora.runs import Run, read_run
from kalm_integrations.errors import SettingsError

BM25_NAME = "bm25"

EXACT = "fp32"
"""The codec that changes no state."""


@dataclass(frozen=True)
class Candidates:
    """A query's candidates in the first stage's order, best first."""

    query: str
    ids: list[str]
    scores: list[float]
    """The first stage's."""


@dataclass(frozen=True)
class Scored:
    """What a reranker makes of all candidates, from encodings at one ratio and codec."""

    ratio: int
    codec: str
    mean_bytes: float
    """Mean length of a passage's metadata string, which is ASCII."""
    margins: dict[str, list[float]]
    """By query id, in the first stage's order."""


def find_candidates(
    collection: Collection, first_stage: str = BM25_NAME, top_k: int = 20, n_queries: int | None = None, seed: int = 0
) -> dict[str, Candidates]:
    """Return the first stage's candidates by query id. A passage with the id of its query is no candidate, as in BEIR.

    Args:
        collection: what to search in.
        first_stage: "bm25", the path of a TREC run file, in which `{collection}` stands for the collection's name, or a
            bi-encoder of sentence-transformers.
        top_k: candidates per query at most.
        n_queries: how many queries to draw; None, or as many as there are, takes all.
        seed: of that draw.

    Raises:
        SettingsError: an argument is out of range, the collection has no passages or no judged queries, or the run does not
            fit to it.
        MissingExtraError: what the first stage needs is not installed.
    """
    for name, value in (("top_k", top_k), ("n_queries", n_queries)):
        if value is not None and value < 1:
            msg = f"{name} must be at least 1, but got {value}"
            raise SettingsError(msg)
    if not collection.passages or not collection.queries:
        have = f"{len(collection.passages)} passages and {len(collection.queries)} judged queries"
        msg = f"a collection must have passages and judged queries, but {collection.name} has {have}; check the split"
        raise SettingsError(msg)
    query_ids = sorted(collection.queries)
    if n_queries is not None and n_queries < len(query_ids):
        query_ids = random.Random(seed).sample(query_ids, n_queries)
    queries = {query_id: collection.queries[query_id] for query_id in query_ids}
    # One more than asked for, in case one of them is the query itself.
    run = _search(first_stage, collection, queries, top_k + 1)
    candidates = {}
    for query_id, query in queries.items():
        found = [(passage_id, score) for passage_id, score in run[query_id] if passage_id != query_id][:top_k]
        candidates[query_id] = Candidates(query, [i for i, _ in found], [score for _, score in found])
    return candidates


def first_stage_name(first_stage: str) -> str:
    """Return what a report calls a first stage; see `find_candidates`."""
    return first_stage if first_stage == BM25_NAME else Path(first_stage).name


def _search(first_stage: str, collection: Collection, queries: Mapping[str, str], k: int) -> Run:
    if first_stage == BM25_NAME:
        ids = list(collection.passages)
        found = BM25(list(collection.passages.values())).search(list(queries.values()), k)
        return {
            query_id: [(ids[index], score) for index, score in zip(indices, scores, strict=True)]
            for query_id, (indices, scores) in zip(queries, found, strict=True)
        }
    path = Path(first_stage.replace("{collection}", collection.name))
    if not path.is_file():
        return peers.search(first_stage, collection.passages, queries, k)
    run = read_run(path)
    for query_id in queries:
        unknown = [passage_id for passage_id, _ in run.get(query_id, []) if passage_id not in collection.passages]
        if unknown or not run.get(query_id):
            problem = f"names {unknown[0]}, which is no passage," if unknown else "has no passage"
            msg = f"{path} must be a run on {collection.name} for all judged queries, but {problem} for query {query_id}"
            raise SettingsError(msg)
    return run


def check_ratios_and_codecs(reranker: KalmReranker, ratios: Sequence[int], codecs: Sequence[str]) -> None:
    """Check what to score at, before any work.

    Raises:
        SettingsError: the reranker rounds what it encodes, a list is empty, a ratio is no multiple of the reranker's, or a
            codec is unknown.
    """
    if reranker.storage_codec != EXACT:
        got = reranker.storage_codec
        msg = f"codecs are measured from storage_codec={EXACT!r}, but the reranker's is {got!r}; open it with that one"
        raise SettingsError(msg)
    if not ratios or not codecs:
        msg = f"ratios and codecs must each name one at least, but got {list(ratios)} and {list(codecs)}"
        raise SettingsError(msg)
    for ratio in ratios:
        if ratio < 1 or ratio % reranker.compression_ratio:
            msg = f"ratios must be multiples of the reranker's compression_ratio={reranker.compression_ratio}, but got {ratio}"
            raise SettingsError(msg)
    for codec in codecs:
        check_codec(codec)


def encode_candidates(
    reranker: KalmReranker, collection: Collection, candidates: Mapping[str, Candidates], show_progress: bool = False
) -> dict[str, EncodedPassage]:
    """Encode each different candidate once, at the reranker's own ratio, and return the encodings by passage id."""
    ids = sorted({passage_id for found in candidates.values() for passage_id in found.ids})
    encodings = reranker.encode_passages([collection.passages[i] for i in ids], show_progress)
    return dict(zip(ids, encodings, strict=True))


def score_settings(
    reranker: KalmReranker,
    candidates: Mapping[str, Candidates],
    encoded: Mapping[str, EncodedPassage],
    ratios: Sequence[int],
    codecs: Sequence[str],
    show_progress: bool = False,
) -> Iterator[Scored]:
    """Score all candidates at every ratio and codec.

    Coarser ratios are pooled from `encoded`, and every encoding makes the round trip through its metadata string before it
    is scored; a passage is pooled once for each ratio and read once for each setting, whatever number of queries it serves.

    Args:
        reranker: scores.
        candidates: by query id.
        encoded: by passage id, at a ratio that divides all `ratios`.
        ratios: compression ratios; repeated ones count once.
        codecs: storage codecs; repeated ones count once.
        show_progress: draw a progress bar.
    """
    total = len(dict.fromkeys(ratios)) * len(dict.fromkeys(codecs)) * count_pairs(candidates)
    with tqdm(total=total, desc="Scoring", unit="pair", disable=not show_progress) as progress:
        for ratio in dict.fromkeys(ratios):
            pooled = {passage_id: encoding.pool(ratio) for passage_id, encoding in encoded.items()}
            for codec in dict.fromkeys(codecs):
                values = {i: replace(encoding, codec=codec).to_metadata() for i, encoding in pooled.items()}
                read = {i: EncodedPassage.from_metadata(value) for i, value in values.items()}
                margins = score_candidates(reranker, candidates, read, progress)
                yield Scored(ratio, codec, fmean(map(len, values.values())), margins)


def count_pairs(candidates: Mapping[str, Candidates]) -> int:
    """Return how many pairs of a query and a passage there are to score."""
    return sum(len(found.ids) for found in candidates.values())


def score_candidates(
    reranker: KalmReranker,
    candidates: Mapping[str, Candidates],
    encodings: Mapping[str, EncodedPassage],
    progress: tqdm[Any] | None = None,
) -> dict[str, list[float]]:
    """Return the margins of each query's candidates, in the first stage's order."""
    pairs = [(found.query, encodings[i]) for found in candidates.values() for i in found.ids]
    scored = iter(score_pairs(reranker, pairs, progress=None if progress is None else progress.update))
    return {query_id: [next(scored).margin for _ in found.ids] for query_id, found in candidates.items()}


def order(ids: Sequence[str], scores: Sequence[float]) -> list[str]:
    """Return ids by falling score; ties keep the first stage's order."""
    return [ids[i] for i in sorted(range(len(ids)), key=lambda i: -scores[i])]
