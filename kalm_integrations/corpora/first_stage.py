"""First stages: which passages of a collection a reranker is given for a query."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kalm_integrations.corpora import peers
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.bm25 import BM25
from kalm_integrations.corpora.runs import Run, read_run
from kalm_integrations.errors import SettingsError

BM25_NAME = "bm25"


@dataclass(frozen=True)
class Candidates:
    """A query's candidates in the first stage's order, best first."""

    query: str
    ids: list[str]
    scores: list[float]
    """The first stage's."""


def find_candidates(
    collection: Collection, first_stage: str = BM25_NAME, top_k: int = 20, n_queries: int | None = None, seed: int = 0
) -> dict[str, Candidates]:
    """Return the first stage's candidates by query id.

    A passage with the id of its query is no candidate, as in BEIR, where it is the query itself; it is one where it is judged
    for this query, as in collections that count both from 1.

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
        judged = collection.qrels[query_id]
        found = [(i, score) for i, score in run[query_id] if i != query_id or i in judged][:top_k]
        candidates[query_id] = Candidates(query, [i for i, _ in found], [score for _, score in found])
    return candidates


def without_missing_queries(collection: Collection, first_stage: str) -> Collection:
    """Return a collection with those of its queries that a run file has passages for.

    Args:
        collection: what to leave queries out of.
        first_stage: see `find_candidates`; what is no run file has passages for all queries.

    Raises:
        SettingsError: the run has none of the queries, or is malformed.
    """
    path = run_path(first_stage, collection)
    if not path.is_file():
        return collection
    run = read_run(path)
    queries = {query_id: query for query_id, query in collection.queries.items() if query_id in run}
    if not queries:
        found = f"it names {', '.join(map(repr, list(run)[:3]))}" if run else "it is empty"
        msg = f"{path} must have passages for judged queries of {collection.name}, but has them for none; {found}"
        raise SettingsError(msg)
    return replace(collection, queries=queries)


def first_stage_name(first_stage: str) -> str:
    """Return what a report calls a first stage; see `find_candidates`."""
    return first_stage if first_stage == BM25_NAME else Path(first_stage).name


def run_path(first_stage: str, collection: Collection) -> Path:
    """Return where the run file lies, if a first stage is one; see `find_candidates`."""
    return Path(first_stage.replace("{collection}", collection.name))


def _search(first_stage: str, collection: Collection, queries: Mapping[str, str], k: int) -> Run:
    if first_stage == BM25_NAME:
        ids = list(collection.passages)
        found = BM25(list(collection.passages.values())).search(list(queries.values()), k)
        return {
            query_id: [(ids[index], score) for index, score in zip(indices, scores, strict=True)]
            for query_id, (indices, scores) in zip(queries, found, strict=True)
        }
    path = run_path(first_stage, collection)
    if not path.is_file():
        return peers.search(first_stage, collection.passages, queries, k)
    run = read_run(path)
    for query_id in queries:
        unknown = [passage_id for passage_id, _ in run.get(query_id, []) if passage_id not in collection.passages]
        if unknown:
            msg = (
                f"{path} must be a run on {collection.name}, but names {unknown[0]}, which is no passage, for query {query_id}"
            )
            raise SettingsError(msg)
    missing = [query_id for query_id in queries if query_id not in run]
    if missing:
        msg = (
            f"{path} must be a run on {collection.name} for all judged queries, but has no passage for {len(missing):,} of "
            f"{len(queries):,}, such as {missing[0]}; leave them out with --skip-missing-queries (in Python: "
            "without_missing_queries)"
        )
        raise SettingsError(msg)
    return run


def order(ids: Sequence[str], scores: Sequence[float]) -> list[str]:
    """Return ids by falling score; ties keep the first stage's order."""
    return [ids[i] for i in sorted(range(len(ids)), key=lambda i: -scores[i])]
