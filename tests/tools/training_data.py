"""Small training data and configurations, shared by the tests of training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kalm_integrations.core.checkpoint import prompts
from kalm_integrations.core.checkpoint.opened import Checkpoint
from kalm_integrations.core.checkpoint.tokenization import PromptTokenizer
from kalm_integrations.core.settings import INSTRUCTION, SYSTEM_INSTRUCTION
from kalm_integrations.training.config import ArchitectureConfig, PhaseConfig
from kalm_integrations.training.data import Cluster, Collator

PASSAGES = ["Otters live on fish and crabs.", "The Rhine rises in the Alps.", "Who lives on fish? Seals do.", "Snow falls."]
QUERIES = ["What do otters eat?", "Where does the Rhine rise?"]
ARCHITECTURE = ArchitectureConfig(vocabulary_size=350, hidden_width=32, mlp_width=32, n_layers=2, head_width=16)


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_collection(folder: Path) -> Path:
    """A BEIR folder: each query has the passage at its own position."""
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", PASSAGES), ("queries", QUERIES)):
        write_lines(folder / f"{name}.jsonl", [{"_id": f"{name}{i}", "text": text} for i, text in enumerate(texts)])
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nqueries0\tcorpus0\t1\nqueries1\tcorpus1\t1\n")
    return folder


def examples(margins: bool = False) -> list[dict[str, Any]]:
    """Lines of training data, one with its own instruction."""
    rows: list[dict[str, Any]] = [
        {"query": QUERIES[0], "positives": PASSAGES[:1], "negatives": PASSAGES[1:]},
        {"query": QUERIES[1], "positives": PASSAGES[1:2], "negatives": PASSAGES[2:], "instruction": "Find the river."},
    ]
    if margins:
        for row in rows:
            row["positive_scores"] = [3.0]
            row["negative_scores"] = [-float(i) for i, _ in enumerate(row["negatives"])]
    return rows


def make_batch(
    folder: Path, rows: Sequence[tuple[str, str | None, list[int]]], ratios: tuple[int, ...], texts: Sequence[str] = PASSAGES
) -> dict[str, Any]:
    """Return the arguments of `TrainableReranker.forward` for (query, instruction, candidates) rows over all passages."""
    tokenizer = PromptTokenizer(Checkpoint.open(folder).load_tokenizer())
    cluster = Cluster(
        index=0,
        passages=tokenizer.passages([prompts.passage_text(text) for text in texts]),
        prompts=[tokenizer.prompt(SYSTEM_INSTRUCTION, instruction or INSTRUCTION, query) for query, instruction, _ in rows],
        candidates=[candidates for *_, candidates in rows],
        margins=[None] * len(rows),
    )
    phase = PhaseConfig(steps=1, compression_ratios=ratios, ratios_per_step="all")
    return Collator(phase, seed=0)([cluster])
