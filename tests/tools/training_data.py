"""Small training data, configurations and models, shared by the tests of training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from kalm_integrations import KalmReranker
from kalm_integrations.core.checkpoint import prompts
from kalm_integrations.core.checkpoint.opened import Checkpoint
from kalm_integrations.core.checkpoint.tokenization import PromptTokenizer
from kalm_integrations.core.settings import INSTRUCTION, SYSTEM_INSTRUCTION
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.training.config import ArchitectureConfig, CollectionConfig, PhaseConfig, TrainConfig
from kalm_integrations.training.data import Cluster, Collator
from kalm_integrations.training.model import TrainableReranker
from tools import corpora

PASSAGES = ["Otters live on fish and crabs.", "The Rhine rises in the Alps.", "Who lives on fish? Seals do.", "Snow falls."]
QUERIES = ["What do otters eat?", "Where does the Rhine rise?"]
ARCHITECTURE = ArchitectureConfig(vocabulary_size=350, hidden_width=32, mlp_width=32, n_layers=2, head_width=16)
ARCHITECTURE_TOML = "[architecture]\n" + "".join(
    f"{name} = {getattr(ARCHITECTURE, name)}\n" for name in ARCHITECTURE.model_fields_set
)


ROWS = [(QUERIES[0], None, [0, 1, 2, 3]), (QUERIES[1], "Find the river.", [1, 3]), (QUERIES[1], None, [1, 0, 3])]
"""Queries with instructions and candidates; the rows differ in all of them."""


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_collection(folder: Path) -> Path:
    """A BEIR folder: each query has the passage at its own position."""
    passages, queries = (
        {f"{name}{i}": text for i, text in enumerate(texts)} for name, texts in (("corpus", PASSAGES), ("queries", QUERIES))
    )
    collection = Collection("", passages, queries, {q: {p: 1} for q, p in zip(queries, passages, strict=False)})
    return corpora.write_collection(collection, folder, split="train")


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


def configuration(output: Path, data: Path, **settings: Any) -> TrainConfig:
    phase = {
        "steps": 6,
        "clusters_per_step": 2,
        "passages_per_cluster": 3,
        "compression_ratios": (1, 2),
        "warmup_steps": 1,
        **settings.pop("phase", {}),
    }
    if "model" not in settings:
        settings["architecture"] = ARCHITECTURE
    defaults = {"save_steps": 2, "logging_steps": 1, "phases": (PhaseConfig(**phase),)}
    return TrainConfig(output=output, collections=(CollectionConfig(path=data),), **{**defaults, **settings})


def trainable(folder: Path, **settings: Any) -> TrainableReranker:
    return TrainableReranker(folder, PromptTokenizer(Checkpoint.open(folder).load_tokenizer()).answer_ids, **settings)


def scores(folder: Path, ratio: int = 1) -> list[float]:
    return KalmReranker.from_pretrained(folder, compression_ratio=ratio).score(QUERIES[0], PASSAGES)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")
