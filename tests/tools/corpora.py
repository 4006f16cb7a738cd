"""Collections of random words, and BEIR folders."""

from __future__ import annotations

import json
import random
from pathlib import Path

from kalm_integrations.corpora.beir import Collection

WORDS = ["wing", "drag", "lift", "bowl", "team", "league", "jazz", "river", "stone", "glass"]


def draw_collection(n_passages: int = 12, n_queries: int = 6, n_words: int = 8, n_asked: int = 2) -> Collection:
    """Passages of `n_words` words, queries of `n_asked`, and two random judgements for each query."""
    draw = random.Random(0)
    passages = {f"p{i}": " ".join(draw.choices(WORDS, k=n_words)) for i in range(n_passages)}
    queries = {f"q{i}": " ".join(draw.sample(WORDS, n_asked)) for i in range(n_queries)}
    qrels = {query_id: dict(zip(draw.sample(list(passages), 2), (1, 2), strict=True)) for query_id in queries}
    return Collection("words", passages, queries, qrels)


def write_collection(collection: Collection, folder: Path, split: str = "test") -> Path:
    """Write a BEIR folder."""
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", collection.passages), ("queries", collection.queries)):
        lines = (json.dumps({"_id": key, "text": text}) + "\n" for key, text in texts.items())
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    rows = (f"{q}\t{p}\t{grade}\n" for q, grades in collection.qrels.items() for p, grade in grades.items())
    (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows), encoding="utf-8")
    return folder
