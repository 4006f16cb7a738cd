"""Runs a training configuration: data, the checkpoint to start from, phase by phase, and the export."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from transformers import TrainerState, set_seed

from kalm_integrations.core.checkpoint.folders import checkpoint_written_beside, copy_files
from kalm_integrations.core.checkpoint.locate import resolve
from kalm_integrations.core.checkpoint.opened import Checkpoint
from kalm_integrations.errors import MissingExtraError
from kalm_integrations.training.callbacks import dev_values
from kalm_integrations.training.card import Figure, facts_of_run
from kalm_integrations.training.config import TrainConfig
from kalm_integrations.training.data import ClusterDataset, Source, fit_teachers
from kalm_integrations.training.dev import DevSet, read_dev_set
from kalm_integrations.training.distillation import embed_training_set
from kalm_integrations.training.exporting import export_checkpoint
from kalm_integrations.training.initialize import create_checkpoint
from kalm_integrations.training.model import TrainableReranker
from kalm_integrations.training.output import RunFolder, hash_data
from kalm_integrations.training.pairs import PairTokenizer
from kalm_integrations.training.phases import Evaluation, check_reports, make_arguments, run_phase
from kalm_integrations.training.sources import TrainingSet, read_training_set
from kalm_integrations.training.tokenizer import train_tokenizer

logger = logging.getLogger(__name__)

N_COUNTED = 2_000
"""Passages of a collection that are tokenised to say how many are cut; more are estimated from as many."""


def train(config: TrainConfig) -> Path:
    """Run every phase of a configuration and return the folder of the trained checkpoint.

    A run that was interrupted goes on where its newest saved step was. Finished phases are not repeated, nor is a finished
    run. Started by `torchrun` or `accelerate launch`, the processes share the work. Only what the run has made is deleted or
    replaced.

    Raises:
        MissingExtraError: a part of the extra `train` is not installed, sentence-transformers for a teacher, or what
            `report_to` names.
        SettingsError: a collection cannot be read, or does not fit what a phase needs; or the output folder holds a run of
            another configuration or of other data, or files in the run's way, or is part of the checkpoint to start from.
        CheckpointError: the checkpoint to start from cannot be used.
        TrainingError: a loss, a gradient or a weight is no finite number.
        KeyboardInterrupt: SIGINT or SIGTERM came; during a phase the step that was reached is saved first.
    """
    check_installed(config)
    arguments = make_arguments(config, config.phases[0], config.output / "phase0")
    is_first = arguments.process_index == 0
    folder = RunFolder(config, arguments.world_size)
    if folder.is_finished():
        return folder.model
    if is_first:
        folder.check()
    sets = read_sets(config)
    dev = None if config.dev is None else read_dev_set(config.dev)
    with arguments.main_process_first(local=False, desc="the start of the run"):
        if is_first:
            hashes = {name: hash_data(texts.passages, texts.queries) for name, texts in sets.items()}
            folder.begin(hashes if dev is None else {**hashes, "dev": dev.hash()})
            if not folder.start.is_dir():
                write_start(config, list(sets.values()), folder.start)
    with arguments.main_process_first(local=False, desc="the teacher's embeddings"):
        sources = make_sources(config, sets, folder.teacher)
    checkpoint = Checkpoint.open(folder.start)
    tokenizer = PairTokenizer.load(checkpoint)
    datasets = make_datasets(config, sources, tokenizer, arguments.world_size)
    if is_first:
        for line in say_cuts(config, sets, tokenizer):
            logger.warning(line)
    # LoRA's matrices are drawn when the model is made.
    set_seed(config.seed)
    model = TrainableReranker(folder.start, tokenizer.tokenizer.answer_ids, config.lora, config.checkpointed_passages)
    evaluation = None if dev is None else Evaluation(dev, tokenizer)
    for index, dataset in enumerate(datasets):
        run_phase(model, dataset, config, index, folder.phase(index), evaluation)
    with arguments.main_process_first(local=False, desc="the export"):
        if is_first:
            card = facts_of_run(config, sets, dev_figures(dev, folder))
            export_checkpoint(folder.start, model.weights(), folder.model, config.export_dtype, card)
            folder.finish()
    return folder.model


def check_installed(config: TrainConfig) -> None:
    """Check that there is what training needs.

    Raises:
        MissingExtraError: something is missing.
        SettingsError: `report_to` names something unknown.
    """
    if find_spec("accelerate") is None:
        msg = 'training needs accelerate; install it with: pip install "kalm-integrations[train]"'
        raise MissingExtraError(msg)
    check_reports(config.report_to)


def read_sets(config: TrainConfig) -> dict[str, TrainingSet]:
    """Return the collections by name, without queries made of passages."""
    return {c.name: read_training_set(c) for c in config.collections}


def write_start(config: TrainConfig, sets: Sequence[TrainingSet], folder: Path) -> None:
    """Write the checkpoint that a run starts from: a copy, or a new one with a tokenizer of the sets' texts."""
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


def make_sources(config: TrainConfig, sets: Mapping[str, TrainingSet], teacher: Path) -> dict[str, Source]:
    """Return the collections with their neighbours, pseudo-queries and teachers, whose embeddings are kept in a folder."""
    if config.pseudo_queries is not None:
        sets = {name: texts.with_pseudo_queries(config.pseudo_queries, config.seed) for name, texts in sets.items()}
    logger.info("searching the hard negatives of %d collections", len(sets))
    sources = {name: Source.build(texts, config.seed) for name, texts in sets.items()}
    if config.teacher is not None:
        sources = {
            name: replace(source, teacher=embed_training_set(source.texts, config.teacher, teacher, bf16=config.bf16))
            for name, source in sources.items()
        }
        fit_teachers(list(sources.values()), [c.weight for c in config.collections], config.seed)
    return sources


def make_datasets(
    config: TrainConfig, sources: Mapping[str, Source], tokenizer: PairTokenizer, n_processes: int = 1
) -> list[ClusterDataset]:
    """Return the clusters of each phase."""
    datasets = []
    for index, phase in enumerate(config.phases):
        chosen = config.collections_of(phase)
        datasets.append(
            ClusterDataset(
                [sources[c.name] for c in chosen],
                [c.weight for c in chosen],
                tokenizer.limited_to(phase),
                phase,
                clusters_per_step=phase.clusters_per_step * phase.accumulated_steps * n_processes,
                seed=config.seed + index,
                pseudo_rate=config.pseudo_queries.rate if config.pseudo_queries else 0.0,
            )
        )
    return datasets


def dev_figures(dev: DevSet | None, folder: RunFolder) -> list[Figure]:
    """Return what the dev collection measured of the start and of the trained weights, after the last phase."""
    if dev is None:
        return []
    last = len(folder.config.phases) - 1
    start, end = (TrainerState.load_from_json(str(folder.phase(i) / "trainer_state.json")) for i in (0, last))
    assert end.best_metric is not None
    figure = Figure(
        dev.collection.name,
        "nDCG@10",
        end.best_metric,
        before=dev_values(start)[0],
        n_queries=len(dev.candidates),
        compression_ratio=dev.compression_ratio,
        chose_step=True,
    )
    return [figure]


def say_cuts(config: TrainConfig, sets: Mapping[str, TrainingSet], tokenizer: PairTokenizer) -> list[str]:
    """Return a line for every phase and collection whose passages are cut.

    Passages beyond `N_COUNTED` are estimated.
    """
    n_tokens = {
        name: tokenizer.n_tokens(texts.passages[:: -(-len(texts.passages) // N_COUNTED)]) for name, texts in sets.items()
    }
    lines = []
    for index, phase in enumerate(config.phases):
        limit = tokenizer.limited_to(phase).max_passage_tokens
        for collection in config.collections_of(phase):
            counted, n_passages = n_tokens[collection.name], len(sets[collection.name].passages)
            n_cut = sum(n > limit for n in counted)
            if n_cut:
                many = f"{n_cut:,} of {len(counted):,} passages"
                some = "" if len(counted) == n_passages else f" drawn from {n_passages:,}"
                lines.append(
                    f"phase {index + 1}: {many}{some} of {collection.name} are cut to max_passage_tokens = "
                    f"{limit}; in use, {tokenizer.max_passage_tokens} tokens are read at a time"
                )
    return lines
