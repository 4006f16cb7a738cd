"""Runs a training configuration on transformers' Trainer, which brings checkpoints, resuming and logging."""

from __future__ import annotations

import logging
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments, get_cosine_schedule_with_warmup
from transformers.trainer_utils import get_last_checkpoint

from kalm_integrations.core.checkpoint import Checkpoint, resolve
from kalm_integrations.core.tokenization import PromptTokenizer
from kalm_integrations.errors import MissingExtraError
from kalm_integrations.evaluation.beir import Collection
from kalm_integrations.training.config import PhaseConfig, TrainConfig
from kalm_integrations.training.data import ClusterDataset, TokenizedCollection, prompt_prefix
from kalm_integrations.training.initialize import create_checkpoint
from kalm_integrations.training.model import TrainableReranker
from kalm_integrations.training.tokenizer import train_tokenizer

logger = logging.getLogger(__name__)

N_NEIGHBOURS = 19
"""Hard negatives kept per passage: with the passage itself, BM25's top 20, the list a reranker is given."""


def train(config: TrainConfig) -> Path:
    """Run every phase of a configuration and return the folder of the trained checkpoint (bfloat16).

    A run that was interrupted goes on where its newest saved step was. Finished phases are not repeated.

    Raises:
        MissingExtraError: the extra `train` is not installed.
        SettingsError: a collection cannot be read.
        CheckpointError: the checkpoint to start from cannot be used.
    """
    if find_spec("accelerate") is None:
        msg = 'training needs accelerate; install it with: pip install "kalm-integrations[train]"'
        raise MissingExtraError(msg)
    collections = [Collection.read(c.path, c.split) for c in config.collections]
    start = config.output / "start"
    if not (start / "model.safetensors").is_file():
        _prepare(config, collections, start)
    tokenizer = PromptTokenizer(Checkpoint.open(start).load_tokenizer())
    logger.info("tokenising %d collections and searching their hard negatives", len(collections))
    tokenized = [TokenizedCollection.build(c, tokenizer, N_NEIGHBOURS, config.seed) for c in collections]
    weights = [c.weight for c in config.collections]
    prefix = prompt_prefix(tokenizer)
    model = TrainableReranker(start, tokenizer.answer_ids)
    for index, phase in enumerate(config.phases):
        dataset = ClusterDataset(tokenized, weights, prefix, phase, seed=config.seed + index)
        _run_phase(model, dataset, phase, config, config.output / f"phase{index}")
    return _export(model, start, config.output / "model")


def _prepare(config: TrainConfig, collections: list[Collection], folder: Path) -> None:
    if config.model is not None:
        shutil.copytree(resolve(config.model), folder)
        return
    texts = (text for c in collections for text in (*c.passages.values(), *c.queries.values()))
    train_tokenizer(texts, config.architecture.vocabulary_size, folder)
    create_checkpoint(config.architecture, folder, config.seed)


def _run_phase(
    model: TrainableReranker, dataset: ClusterDataset, phase: PhaseConfig, config: TrainConfig, folder: Path
) -> None:
    finished = folder / "model.safetensors"
    if finished.is_file():
        model.load_state_dict(load_file(finished))
        return
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=phase.steps,
        per_device_train_batch_size=1,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        max_grad_norm=1.0,
        logging_steps=50,
        save_steps=config.save_steps,
        save_total_limit=1,
        seed=config.seed,
        report_to=[],
        disable_tqdm=not sys.stderr.isatty(),
        remove_unused_columns=False,
        dataloader_num_workers=0,
    )
    optimizer = MuonAndAdamW(model, phase.matrix_learning_rate, phase.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, phase.warmup_steps, phase.steps)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=lambda steps: steps[0],
        optimizers=(optimizer, schedule),
    )
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    save_file(model.state_dict(), finished)


def _export(model: TrainableReranker, start: Path, folder: Path) -> Path:
    shutil.copytree(start, folder, dirs_exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the layers, AdamW for embeddings and norms, as one optimizer for the Trainer."""

    def __init__(self, model: nn.Module, matrix_learning_rate: float, learning_rate: float) -> None:
        """Split a model's parameters between the two."""
        named = list(model.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and ".layers." in name]
        others = [p for name, p in named if p.ndim != 2 or ".layers." not in name]
        self._parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, lr=matrix_learning_rate, weight_decay=0.01),
            torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
        )
        super().__init__([p for _, p in named], {})
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters."""
        for part in self._parts:
            part.step(closure)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of both."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self._parts for group in part.param_groups]
