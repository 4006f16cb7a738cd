"""Runs a training configuration on transformers' Trainer, which brings checkpoints, resuming, devices and logging."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from kalm_integrations.core.checkpoint.folders import check_target, checkpoint_written_beside, copy_files
from kalm_integrations.core.checkpoint.locate import resolve
from kalm_integrations.core.checkpoint.opened import Checkpoint
from kalm_integrations.core.checkpoint.tokenization import PromptTokenizer
from kalm_integrations.core.settings import INSTRUCTION, SYSTEM_INSTRUCTION
from kalm_integrations.errors import MissingExtraError, SettingsError
from kalm_integrations.files import written_beside
from kalm_integrations.training.config import PhaseConfig, TrainConfig
from kalm_integrations.training.data import ClusterDataset, Collator, Source, fit_teachers
from kalm_integrations.training.distillation import embed_training_set
from kalm_integrations.training.exporting import export_checkpoint
from kalm_integrations.training.initialize import create_checkpoint
from kalm_integrations.training.model import TrainableReranker
from kalm_integrations.training.optimizer import MatrixOptimizer, make_adamw
from kalm_integrations.training.sources import TrainingSet, read_training_set
from kalm_integrations.training.tokenizer import train_tokenizer

logger = logging.getLogger(__name__)

NOT_COMPARED = {"output", "save_steps", "logging_steps"}
"""Settings that a run may change when it goes on."""

RECORD = "config.json"
"""The settings of the run that an output folder belongs to; everything else in the folder is written after it."""

MADE = re.compile(r"start|teacher|phase\d+|model")
"""What a run makes beside its record."""

FINISHED = "model.safetensors"
"""The weights after a phase, in its folder."""


def train(config: TrainConfig) -> Path:
    """Run every phase of a configuration and return the folder of the trained checkpoint.

    A run that was interrupted goes on where its newest saved step was. Finished phases are not repeated, nor is a finished
    run. Started by `torchrun` or `accelerate launch`, the processes share the work. Only what the run has made is deleted or
    replaced.

    Raises:
        MissingExtraError: a part of the extra `train`, or sentence-transformers for a teacher, is not installed.
        SettingsError: a collection cannot be read, or does not fit what a phase needs; or the output folder holds a run of
            another configuration or files in the run's way, or is part of the checkpoint to start from.
        CheckpointError: the checkpoint to start from cannot be used.
    """
    if find_spec("accelerate") is None:
        msg = 'training needs accelerate; install it with: pip install "kalm-integrations[train]"'
        raise MissingExtraError(msg)
    start, target = config.output / "start", config.output / "model"
    arguments = _arguments(config, config.phases[0], config.output / "phase0")
    if arguments.process_index == 0:
        _check_output(config, start, target)
    if _is_finished(config, target):
        return target
    sets = {c.name: read_training_set(c) for c in config.collections}
    with arguments.main_process_first(local=False, desc="the start of the run"):
        if arguments.process_index == 0 and not start.is_dir():
            _prepare(config, list(sets.values()), start)
    if config.pseudo_queries is not None:
        sets = {name: texts.with_pseudo_queries(config.pseudo_queries, config.seed) for name, texts in sets.items()}
    logger.info("searching the hard negatives of %d collections", len(sets))
    sources = {name: Source.build(texts, config.seed) for name, texts in sets.items()}
    if config.teacher is not None:
        with arguments.main_process_first(local=False, desc="the teacher's embeddings"):
            sources = {
                name: replace(
                    source,
                    teacher=embed_training_set(source.texts, config.teacher, config.output / "teacher", bf16=config.bf16),
                )
                for name, source in sources.items()
            }
        fit_teachers(list(sources.values()), [c.weight for c in config.collections], config.seed)
    checkpoint = Checkpoint.open(start)
    tokenizer = PromptTokenizer(checkpoint.load_tokenizer())
    instructions = (
        checkpoint.defaults.system_instruction or SYSTEM_INSTRUCTION,
        checkpoint.defaults.instruction or INSTRUCTION,
    )
    datasets = [
        _make_dataset(config, index, sources, tokenizer, instructions, arguments.world_size)
        for index in range(len(config.phases))
    ]
    model = TrainableReranker(start, tokenizer.answer_ids, config.lora, config.checkpointed_passages)
    for index, dataset in enumerate(datasets):
        _run_phase(model, dataset, config, index)
    with arguments.main_process_first(local=False, desc="the export"):
        if arguments.process_index == 0:
            export_checkpoint(start, model.weights(), target, config.export_dtype)
    return target


def _check_output(config: TrainConfig, start: Path, target: Path) -> None:
    """Check that the output folder has room for a new run, or belongs to this one.

    Raises:
        SettingsError: it does not.
    """
    path = config.output / RECORD
    if not path.is_file():
        names = [p.name for p in config.output.iterdir() if MADE.fullmatch(p.name)] if config.output.exists() else []
        if names:
            msg = (
                f"a new run needs an output folder without {', '.join(sorted(names))}, but {config.output} has them and no "
                f"{RECORD} that tells of a run; choose another output, or move them away"
            )
            raise SettingsError(msg)
        check_target(start, [] if config.model is None else [resolve(config.model)])
        return
    try:
        recorded = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        recorded = {}
    settings = _recorded_settings(config)
    if "phases" not in recorded:
        msg = f"{path} must be the record of a run, but is something else; choose another output"
        raise SettingsError(msg)
    changed = sorted(key for key in settings.keys() | recorded.keys() if settings.get(key) != recorded.get(key))
    if changed:
        msg = (
            f"a run goes on with the settings it began with, but {config.output} holds one with other {', '.join(changed)}; "
            "choose another output, or delete that run"
        )
        raise SettingsError(msg)
    if not _is_finished(config, target):
        check_target(target, [start])


def _recorded_settings(config: TrainConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=NOT_COMPARED)


def _is_finished(config: TrainConfig, target: Path) -> bool:
    phases = (config.output / f"phase{index}" / FINISHED for index in range(len(config.phases)))
    return target.is_dir() and all(path.is_file() for path in phases)


def _prepare(config: TrainConfig, sets: Sequence[TrainingSet], folder: Path) -> None:
    """Leave a record of the settings in the output folder, and write the checkpoint that the run starts from."""
    config.output.mkdir(parents=True, exist_ok=True)
    with written_beside(config.output / RECORD) as part:
        part.write_text(json.dumps(_recorded_settings(config), indent=2) + "\n", encoding="utf-8")
    source = None if config.model is None else resolve(config.model)
    with checkpoint_written_beside(folder, [] if source is None else [source]) as part:
        if source is not None:
            Checkpoint.open(source).text_names()
            copy_files(source, part, weights=True)
        else:
            # Queries that were made of passages would count these twice.
            texts = (text for texts in sets for text in (*texts.passages, *(query.text for query in texts.queries)))
            train_tokenizer(texts, config.architecture.vocabulary_size, part)
            create_checkpoint(config.architecture, part, config.seed)


def _make_dataset(
    config: TrainConfig,
    index: int,
    sources: dict[str, Source],
    tokenizer: PromptTokenizer,
    instructions: tuple[str, str],
    n_processes: int,
) -> ClusterDataset:
    phase = config.phases[index]
    chosen = config.collections_of(phase)
    return ClusterDataset(
        [sources[c.name] for c in chosen],
        [c.weight for c in chosen],
        tokenizer,
        instructions,
        phase,
        clusters_per_step=phase.clusters_per_step * phase.accumulated_steps * n_processes,
        seed=config.seed + index,
        pseudo_rate=config.pseudo_queries.rate if config.pseudo_queries else 0.0,
    )


def _arguments(config: TrainConfig, phase: PhaseConfig, folder: Path, n_steps: int = 1) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=n_steps,
        per_device_train_batch_size=phase.clusters_per_step,
        gradient_accumulation_steps=phase.accumulated_steps,
        bf16=config.bf16,
        use_cpu=not torch.cuda.is_available(),
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        warmup_steps=phase.warmup_steps,
        logging_steps=config.logging_steps,
        save_steps=config.save_steps,
        seed=config.seed,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )
    if arguments.n_gpu > 1:
        # One process with several GPUs would cut every tensor of a batch along its first dimension.
        logger.warning("one of %d GPUs is used; torchrun --nproc-per-node %d uses all", arguments.n_gpu, arguments.n_gpu)
        arguments._n_gpu = 1  # noqa: SLF001
    return arguments


def _run_phase(model: TrainableReranker, dataset: ClusterDataset, config: TrainConfig, index: int) -> None:
    phase = config.phases[index]
    folder = config.output / f"phase{index}"
    finished = folder / FINISHED
    if finished.is_file():
        model.load_state_dict(load_file(finished))
        return
    model.losses, model.teacher_weight = phase.losses, phase.teacher_weight
    trainer = _PhaseTrainer(
        model=model,
        args=_arguments(config, phase, folder, dataset.n_steps),
        train_dataset=dataset,
        data_collator=Collator(phase, config.seed + index),
        callbacks=[_LogLines(f"phase {index + 1} of {len(config.phases)}"), _KeepNewest()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.use(config, phase)
    trainer.train(resume_from_checkpoint=_newest_complete(folder))
    if trainer.is_world_process_zero():
        trainer.save_state()
        with written_beside(finished) as part:
            save_file(model.state_dict(), part)
        # Thrice the size of the model, and of no more use.
        for saved in _saved_steps(folder):
            shutil.rmtree(saved)
    trainer.accelerator.wait_for_everyone()


def _newest_complete(folder: Path) -> str | None:
    """Return the newest saved step whose saving was not cut off; the Trainer writes its own state last."""
    for path in reversed(_saved_steps(folder)):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s is incomplete and left out", path)
            continue
        return str(path)
    return None


def _saved_steps(folder: Path) -> list[Path]:
    """Return the folders of a phase's saved steps, the newest last; what is named otherwise is not the run's."""
    numbers = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")}
    found = {path: int(number[1]) for path, number in numbers.items() if number and path.is_dir() and not path.is_symlink()}
    return sorted(found, key=found.__getitem__)


class _PhaseTrainer(Trainer):
    """A Trainer with the optimizer of a phase."""

    def use(self, config: TrainConfig, phase: PhaseConfig) -> None:
        """Choose what `create_optimizer` makes."""
        is_new = config.model is None
        default = 2e-3 if is_new else 2e-4 if config.lora else 2e-5
        self._uses_muon = (phase.optimizer or ("muon" if is_new else "adamw")) == "muon"
        self._rates = (phase.matrix_learning_rate, phase.learning_rate or default, phase.weight_decay)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer once."""
        if self.optimizer is None:
            matrix_rate, rate, decay = self._rates
            trained = self.model if model is None else model
            assert trained is not None
            self.optimizer = (
                MatrixOptimizer(trained, matrix_rate, rate, decay) if self._uses_muon else make_adamw(trained, rate, decay)
            )
        return self.optimizer


class _LogLines(TrainerCallback):
    """Reports the loss through logging, so that standard output keeps its one line, the folder."""

    def __init__(self, name: str) -> None:
        self._name = name

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        del args, control, kwargs
        if state.is_world_process_zero and logs and "loss" in logs:
            logger.info("%s, step %d of %d: loss %.4f", self._name, state.global_step, state.max_steps, float(logs["loss"]))


class _KeepNewest(TrainerCallback):
    """Deletes the saved steps that a newer one replaces: `save_total_limit` would delete what is named alike, too."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del control, kwargs
        if state.is_world_process_zero:
            for path in _saved_steps(Path(args.output_dir)):
                if path.name != f"checkpoint-{state.global_step}":
                    shutil.rmtree(path)
