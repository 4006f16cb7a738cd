"""Runs a phase on transformers' Trainer, which brings checkpoints, resuming, devices, logging and reports."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from kalm_integrations.errors import MissingExtraError, SettingsError
from kalm_integrations.files import written_beside
from kalm_integrations.training.callbacks import (
    DEV_METRIC,
    KeepBest,
    KeepNewest,
    LogLines,
    RefuseNonFinite,
    StopOnSignal,
    TrainingStoppedError,
    dev_values,
)
from kalm_integrations.training.config import PhaseConfig, TrainConfig
from kalm_integrations.training.data import ClusterDataset, Collator
from kalm_integrations.training.dev import DevSet
from kalm_integrations.training.model import TrainableReranker
from kalm_integrations.training.optimizer import MatrixOptimizer, make_adamw
from kalm_integrations.training.output import BEST, FINISHED, newest_complete, saved_steps
from kalm_integrations.training.pairs import PairTokenizer

logger = logging.getLogger(__name__)

LOGGING_STEPS, LOGS_PER_PHASE = 50, 10
"""Steps between two lines of the log where none are set: fewer in a phase that would have fewer lines."""

WARMUP_STEPS, WARMUP_SHARE = 60, 10
"""Steps of warm-up where none are set: at most this part of a phase."""


@dataclass(frozen=True)
class Evaluation:
    """How weights are evaluated during training."""

    dev: DevSet
    tokenizer: PairTokenizer
    """With the limits that hold in use."""


class PhaseTrainer(Trainer):
    """A Trainer with a phase's optimizer, and the dev collection's evaluation."""

    def __init__(
        self,
        model: TrainableReranker,
        dataset: ClusterDataset,
        config: TrainConfig,
        index: int,
        arguments: TrainingArguments,
        evaluation: Evaluation | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        """Set up a phase; nothing is trained yet.

        Args:
            model: to train.
            dataset: of the phase.
            config: of the run.
            index: of the phase.
            arguments: the Trainer's.
            evaluation: what `evaluate` does.
            callbacks: beside the Trainer's own.
        """
        phase = config.phases[index]
        model.losses, model.teacher_weight = phase.losses, phase.teacher_weight
        is_new = config.model is None
        default = 2e-3 if is_new else 2e-4 if config.lora else 2e-5
        self._uses_muon = (phase.optimizer or ("muon" if is_new else "adamw")) == "muon"
        self._rates = (phase.matrix_learning_rate, phase.learning_rate or default, phase.weight_decay)
        self._evaluation = evaluation
        self._trained = model
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=Collator(phase, config.seed + index),
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer once."""
        if self.optimizer is None:
            matrix_rate, rate, decay = self._rates
            trained = self._trained if model is None else model
            self.optimizer = (
                MatrixOptimizer(trained, matrix_rate, rate, decay) if self._uses_muon else make_adamw(trained, rate, decay)
            )
        return self.optimizer

    def evaluate(self, *_args: Any, **_kwargs: Any) -> dict[str, float]:
        """Rank the dev collection, log its nDCG@10 and tell the callbacks."""
        assert self._evaluation is not None
        ndcg = self._evaluation.dev.evaluate(
            self._trained,
            self._evaluation.tokenizer,
            # As in use, where a CPU computes in float32.
            bf16=self.args.bf16 and self.args.device.type != "cpu",
            part=self.args.process_index,
            n_parts=self.args.world_size,
        )
        metrics = {DEV_METRIC: ndcg}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def check_reports(names: Sequence[str]) -> None:
    """Check that the Trainer can report to programs.

    Raises:
        SettingsError: it does not know one.
        MissingExtraError: one is not installed.
    """
    known = set(INTEGRATION_TO_CALLBACK)
    for name in names:
        if name not in known:
            msg = f"report_to must be among {', '.join(sorted(known))}, but got {name!r}"
            raise SettingsError(msg)
        if name not in get_available_reporting_integrations():
            msg = f"reporting to {name} needs it installed: pip install {name}"
            raise MissingExtraError(msg)


def make_arguments(config: TrainConfig, phase: PhaseConfig, folder: Path, n_steps: int = 1) -> TrainingArguments:
    """Return the Trainer's arguments for a phase of `n_steps` steps."""
    warmup_steps = min(WARMUP_STEPS, n_steps // WARMUP_SHARE) if phase.warmup_steps is None else phase.warmup_steps
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=n_steps,
        per_device_train_batch_size=phase.clusters_per_step,
        gradient_accumulation_steps=phase.accumulated_steps,
        bf16=config.bf16,
        use_cpu=not torch.cuda.is_available(),
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type="cosine",
        warmup_steps=warmup_steps,
        logging_steps=config.logging_steps or max(1, min(LOGGING_STEPS, n_steps // LOGS_PER_PHASE)),
        logging_nan_inf_filter=False,
        save_steps=config.save_steps,
        seed=config.seed,
        report_to=list(config.report_to),
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )
    if arguments.n_gpu > 1:
        # One process with several GPUs would cut every tensor of a batch along its first dimension.
        logger.warning("one of %d GPUs is used; torchrun --nproc-per-node %d uses all", arguments.n_gpu, arguments.n_gpu)
        arguments._n_gpu = 1  # noqa: SLF001
    return arguments


def run_phase(
    model: TrainableReranker,
    dataset: ClusterDataset,
    config: TrainConfig,
    index: int,
    folder: Path,
    evaluation: Evaluation | None = None,
) -> None:
    """Train a model in a phase, or give it the weights that the phase has ended with.

    Args:
        model: to train; holds the weights of the phase's end, or of its best evaluation, afterwards.
        dataset: of the phase.
        config: of the run.
        index: of the phase.
        folder: of the phase; a run that was interrupted goes on from what is there.
        evaluation: of the weights, during training.

    Raises:
        TrainingError: a loss or a gradient is no number.
        TrainingStoppedError: a signal came; the step that was reached is saved.
    """
    finished = folder / FINISHED
    if finished.is_file():
        model.load_state_dict(load_file(finished))
        return
    name = f"phase {index + 1} of {len(config.phases)}"
    newest = newest_complete(folder)
    arguments = make_arguments(config, config.phases[index], folder, dataset.n_steps)
    if arguments.warmup_steps >= dataset.n_steps:
        logger.warning(
            "%s: the learning rate warms up over %d steps, but there are %d, so it never gets to its full height; lower "
            "warmup_steps",
            name,
            arguments.warmup_steps,
            dataset.n_steps,
        )
    callbacks: list[TrainerCallback] = [RefuseNonFinite(), LogLines(name), KeepNewest()]
    if config.dev is not None:
        arguments.eval_on_start = newest is None
        callbacks.append(KeepBest(config.dev))
    trainer = PhaseTrainer(model, dataset, config, index, arguments, evaluation, callbacks)

    def synchronise(asked: bool) -> bool:
        if asked:
            trainer.accelerator.set_trigger()
        return bool(trainer.accelerator.check_trigger())

    with StopOnSignal(synchronise) as stop:
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    if stop.received is not None:
        raise TrainingStoppedError(stop.received, f"step {trainer.state.global_step} of {trainer.state.max_steps} in {name}")
    if trainer.is_world_process_zero():
        _use_best(model, trainer, folder, name)
        trainer.save_state()
        with written_beside(finished) as part:
            save_file(model.state_dict(), part)
        # Thrice the size of the model, and of no more use.
        for path in saved_steps(folder):
            shutil.rmtree(path)
        (folder / BEST).unlink(missing_ok=True)
    trainer.accelerator.wait_for_everyone()


def _use_best(model: TrainableReranker, trainer: PhaseTrainer, folder: Path, name: str) -> None:
    """Give the model the weights of the best evaluation, if there were any."""
    values = dev_values(trainer.state)
    if not values:
        return
    best = max(values)
    steps = [int(entry["step"]) for entry in trainer.state.log_history if DEV_METRIC in entry]
    step = steps[values.index(best)]
    trainer.state.best_metric, trainer.state.best_global_step = best, step
    model.load_state_dict(load_file(folder / BEST))
    if step == 0:
        logger.warning("%s: no step ranked dev better than the start (%.4f), so the weights stay as they were", name, best)
    else:
        gain = best - values[0]
        logger.info("%s: step %d is taken, which ranked dev best: nDCG@10 %.4f, %+.4f to the start", name, step, best, gain)
