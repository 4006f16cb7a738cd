"""What a run will do, take and need, from its data and ten measured steps of each phase; nothing is kept."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from kalm_integrations.core.checkpoint.opened import Checkpoint
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.overlap import Overlap, find_overlap
from kalm_integrations.files import nearest_existing
from kalm_integrations.training.config import TrainConfig
from kalm_integrations.training.data import ClusterDataset
from kalm_integrations.training.dev import DevSet, read_dev_set
from kalm_integrations.training.model import TrainableReranker
from kalm_integrations.training.output import RunFolder
from kalm_integrations.training.pairs import PairTokenizer
from kalm_integrations.training.phases import PhaseTrainer, make_arguments
from kalm_integrations.training.sources import TrainingSet
from kalm_integrations.training.trainer import check_installed, make_datasets, make_sources, read_sets, say_cuts, write_start

N_TIMED = 10
"""Steps that are timed, behind one that warms up."""

N_TIMED_QUERIES = 10
"""Of the dev collection."""


@dataclass(frozen=True)
class PhaseForecast:
    """What a phase will do."""

    n_examples: int
    n_steps: int
    clusters_per_step: int
    """Of all batches whose gradients make one step."""
    step_seconds: float
    """Mean of the timed steps."""
    n_timed: int
    evaluation_seconds: float
    """Of all its evaluations together."""

    @property
    def seconds(self) -> float:
        """How long it will take."""
        return self.n_steps * self.step_seconds + self.evaluation_seconds


@dataclass(frozen=True)
class Forecast:
    """What a run will do."""

    collections: Mapping[str, tuple[int, int]]
    """Queries and passages by name."""
    n_parameters: int
    n_trained: int
    """Parameters that are trained: fewer with LoRA."""
    phases: tuple[PhaseForecast, ...]
    cuts: tuple[str, ...]
    """A line for every phase and collection whose passages are cut."""
    overlaps: Mapping[str, Overlap]
    """How much of each collection to evaluate on is in the training data."""
    peak_bytes: int
    """What the output folder takes at most."""
    kept_bytes: int
    """What it takes in the end."""
    free_bytes: int
    """What the disk has."""


def forecast(config: TrainConfig, held_out: Sequence[tuple[Path, str]] = ()) -> Forecast:
    """Read a run's data, train ten steps of each phase in a temporary folder, and say what the run will take.

    A teacher's embeddings are left out: their making takes longer than anything else here.

    Args:
        config: of the run.
        held_out: BEIR folders with their splits, to be compared with the training data, as the dev collection is.

    Raises:
        SettingsError: as `train` raises it.
        MissingExtraError: as `train` raises it.
        CheckpointError: as `train` raises it.
    """
    check_installed(config)
    folder = RunFolder(config, 1)
    if not folder.is_finished():
        folder.check()
    plain = config.model_copy(update={"teacher": None, "report_to": ()})
    sets = read_sets(plain)
    dev = None if config.dev is None else read_dev_set(config.dev)
    sources = make_sources(plain, sets, folder.teacher)
    with TemporaryDirectory(prefix="kalm-dry-run-") as name:
        start = Path(name) / "start"
        write_start(plain, list(sets.values()), start)
        tokenizer = PairTokenizer.load(Checkpoint.open(start))
        set_seed(config.seed)
        model = TrainableReranker(start, tokenizer.tokenizer.answer_ids, config.lora, config.checkpointed_passages)
        seconds = 0.0 if dev is None else _evaluation_seconds(dev, model, tokenizer)
        phases, optimizer_bytes = [], 0
        for index, dataset in enumerate(make_datasets(plain, sources, tokenizer)):
            phase, n_bytes = _time_phase(model, dataset, plain, index, Path(name), seconds)
            phases.append(phase)
            optimizer_bytes = max(optimizer_bytes, n_bytes)
        start_bytes = sum(path.stat().st_size for path in start.iterdir())
    held = {str(path): Collection.read(path, split) for path, split in held_out}
    if dev is not None:
        held = {f"dev ({dev.collection.name})": dev.collection, **held}
    weights_bytes = 4 * sum(tensor.numel() for tensor in model.state_dict().values())
    n_parameters = sum(tensor.numel() for tensor in model.weights().values())
    export_bytes = n_parameters * getattr(torch, config.export_dtype).itemsize
    peak, kept = _disk(config, start_bytes, weights_bytes, optimizer_bytes, export_bytes)
    return Forecast(
        collections={name: (texts.n_real, len(texts.passages)) for name, texts in sets.items()},
        n_parameters=n_parameters,
        n_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        phases=tuple(phases),
        cuts=tuple(say_cuts(plain, sets, tokenizer)),
        overlaps={name: _overlap(list(sets.values()), collection) for name, collection in held.items()},
        peak_bytes=peak,
        kept_bytes=kept,
        free_bytes=shutil.disk_usage(nearest_existing(config.output)).free,
    )


def _time_phase(
    model: TrainableReranker, dataset: ClusterDataset, config: TrainConfig, index: int, folder: Path, evaluation_seconds: float
) -> tuple[PhaseForecast, int]:
    """Return what a phase will do, and the bytes of its optimizer."""
    phase = config.phases[index]
    arguments = make_arguments(config, phase, folder, min(N_TIMED + 1, dataset.n_steps))
    arguments.save_strategy = "no"
    timer = _Timer()
    trainer = PhaseTrainer(model, dataset, config, index, arguments, callbacks=[timer])
    trainer.train()
    steps = timer.seconds[1:] or timer.seconds
    state = trainer.create_optimizer().state
    n_bytes = sum(v.nbytes for each in state.values() for v in each.values() if isinstance(v, torch.Tensor))
    n_evaluations = 0 if config.dev is None else 1 + math.ceil(dataset.n_steps / config.dev.every_steps)
    made = PhaseForecast(
        n_examples=dataset.n_examples,
        n_steps=dataset.n_steps,
        clusters_per_step=phase.clusters_per_step * phase.accumulated_steps,
        step_seconds=fmean(steps),
        n_timed=len(steps),
        evaluation_seconds=n_evaluations * evaluation_seconds,
    )
    return made, n_bytes


class _Timer(TrainerCallback):
    """Notes how long each step takes."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, state, control, kwargs
        # The first one, because the batches behind it are made between two steps.
        self._last = self._last or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, state, control, kwargs
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def _evaluation_seconds(dev: DevSet, model: TrainableReranker, tokenizer: PairTokenizer) -> float:
    few = dict(list(dev.candidates.items())[:N_TIMED_QUERIES])
    started = time.perf_counter()
    replace(dev, candidates=few).evaluate(model, tokenizer, bf16=False)
    return (time.perf_counter() - started) / len(few) * len(dev.candidates)


def _disk(config: TrainConfig, start: int, weights: int, optimizer: int, export: int) -> tuple[int, int]:
    """Return the bytes that a run takes at most and in the end; see docs/training.md."""
    phases = len(config.phases) * weights
    best = 0 if config.dev is None else weights
    # While a step is being saved, the one before is still there.
    saved = 2 * (weights + optimizer)
    peak = max(start + phases - weights + best + saved, start + phases + export)
    return peak, export + (start + phases if config.keep_intermediate else 0)


def _overlap(sets: Sequence[TrainingSet], collection: Collection) -> Overlap:
    return find_overlap(
        training_queries=(query.text for texts in sets for query in texts.queries),
        training_passages=(passage for texts in sets for passage in texts.passages),
        queries=list(collection.queries.values()),
        passages=list(collection.passages.values()),
    )
