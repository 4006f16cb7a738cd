"""What happens beside the steps of a phase: the log, the best evaluation, saved steps, signals, and numbers that are none."""

from __future__ import annotations

import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from kalm_integrations.errors import TrainingError
from kalm_integrations.files import written_beside
from kalm_integrations.training.config import DevConfig
from kalm_integrations.training.output import BEST, saved_steps

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

DEV_METRIC = "eval_nDCG@10"
"""What the log and `trainer_state.json` call the dev collection's mean nDCG@10."""


class TrainingStoppedError(KeyboardInterrupt):
    """A signal stopped a run behind a step, which is saved."""

    def __init__(self, number: int, step: str) -> None:
        """Take the signal's number, and what to call the step."""
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after {step}, which is saved; the same command goes on there")
        self.number = number


class LogLines(TrainerCallback):
    """Reports the loss through logging, so that standard output keeps its one line, the folder."""

    def __init__(self, name: str) -> None:
        """Take what lines call the phase."""
        self._name = name
        self._first_step = 0
        self._started: float | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock with the first step; the start may have been evaluated before."""
        if self._started is None:
            self._first_step, self._started = state.global_step, time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write a line."""
        if not state.is_world_process_zero or not logs:
            return
        place = f"{self._name}, step {state.global_step} of {state.max_steps}"
        if "loss" in logs and self._started is not None:
            n_done = state.global_step - self._first_step
            left = (time.monotonic() - self._started) / n_done * (state.max_steps - state.global_step)
            facts = [f"loss {logs['loss']:.4f}"]
            if "grad_norm" in logs:
                facts.append(f"gradient norm {logs['grad_norm']:.3g}")
            logger.info("%s: %s, learning rate %.2e, %s left", place, ", ".join(facts), logs["learning_rate"], to_clock(left))
        elif DEV_METRIC in logs:
            logger.info("%s: dev nDCG@10 %.4f", place, logs[DEV_METRIC])


def to_clock(seconds: float) -> str:
    """Return a time such as 1:05:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


class KeepNewest(TrainerCallback):
    """Deletes the saved steps that a newer one replaces: `save_total_limit` would delete what is named alike, too."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Delete older ones."""
        if state.is_world_process_zero:
            for path in saved_steps(Path(args.output_dir)):
                if path.name != f"checkpoint-{state.global_step}":
                    shutil.rmtree(path)


class KeepBest(TrainerCallback):
    """Asks for evaluations, keeps the weights of the best one, and ends a phase that has not become better for long."""

    def __init__(self, dev: DevConfig) -> None:
        """Take the settings."""
        self._dev = dev

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for an evaluation every so many steps, and at the end."""
        if state.global_step % self._dev.every_steps == 0 or state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the weights if they are the best so far."""
        # The log is saved with each step, so that a run that goes on knows what it has seen.
        values = dev_values(state)
        if state.is_world_process_zero and values[-1] > max(values[:-1], default=-math.inf):
            with written_beside(Path(args.output_dir) / BEST) as part:
                save_file(kwargs["model"].state_dict(), part)
        n_since = len(values) - 1 - values.index(max(values))
        if self._dev.patience is not None and n_since >= self._dev.patience:
            if state.is_world_process_zero:
                logger.info("the last %d evaluations brought nothing better than %.4f: the phase ends", n_since, max(values))
            control.should_training_stop = True


def dev_values(state: Any) -> list[float]:
    """Return the dev collection's values that a Trainer's state has seen, in order."""
    return [entry[DEV_METRIC] for entry in state.log_history if DEV_METRIC in entry]


class RefuseNonFinite(TrainerCallback):
    """Ends a run whose gradients are no numbers, before they reach the weights."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the gradients of a step.

        Raises:
            TrainingError: one of them is NaN or infinite.
        """
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            msg = (
                f"losses and gradients must be finite numbers, but those of step {state.global_step + 1} of {args.output_dir} "
                "are not, so the run ends and exports nothing; lower the learning rates or raise warmup_steps, try bf16 = "
                "false, and start the run anew in another output"
            )
            raise TrainingError(msg)


class StopOnSignal(TrainerCallback):
    """Ends a phase behind the step in which SIGINT or SIGTERM came, and has it saved; a second signal acts as ever."""

    def __init__(self, synchronise: Callable[[bool], bool]) -> None:
        """Take what tells all processes whether one of them was asked to stop."""
        self.received: int | None = None
        self._synchronise = synchronise
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Take the signals, in a main thread."""
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        """Give the signals back."""
        self._give_back()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop and save if a signal came."""
        if self._synchronise(self.received is not None):
            self.received = self.received or signal.SIGTERM
            control.should_save = control.should_training_stop = True

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        self._give_back()
        logger.warning("%s: stopping after this step, which is saved", signal.Signals(number).name)

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
