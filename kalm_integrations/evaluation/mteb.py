"""A reranker under mteb's cross-encoder protocol, and mteb's two-stage evaluation with it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from tqdm.auto import tqdm

from kalm_integrations.core.base import Reranker
from kalm_integrations.core.pairs import score_pairs
from kalm_integrations.core.settings import StorageSettings, make_settings
from kalm_integrations.core.types import AnyPassage
from kalm_integrations.errors import MissingExtraError, SettingsError
from kalm_integrations.evaluation.stored import StoredEncodings
from kalm_integrations.hosting import as_reranker
from kalm_integrations.hosting.models import fingerprints_of

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.models.model_meta import ModelMeta

    from kalm_integrations.core.reranker import KalmReranker


class MtebReranker:
    """Scores the pairs of an mteb task, encoding each passage once.

    With `long_passages="cut"`, or where no passage is longer than `max_passage_tokens`, the scores are those of mteb's own
    `KaLMRerankerWrapper`, which encodes a passage anew for every pair.

    ```python
    mteb.evaluate(MtebReranker("nano"), mteb.get_task("AskUbuntuDupQuestions"))
    ```
    """

    def __init__(
        self,
        model: Reranker | str | os.PathLike[str] = "pico",
        revision: str | None = None,
        device: str | None = None,
        encodings: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        """Open a checkpoint, or take a reranker that is open.

        Args:
            model: an alias, a hub id, a folder, or a reranker.
            revision: see `KalmReranker.from_pretrained`.
            device: see there.
            encodings: a folder in which encodings are kept between runs; needs a `model` by name. Without it a passage is
                encoded once as long as the reranker's `cache_bytes` hold it.
            **settings: see there. mteb files results under them.

        Raises:
            MissingExtraError: mteb is not installed.
            SettingsError: a setting is out of range or unknown, or `model` is a reranker that has its own.
            CheckpointError: the checkpoint is not there or cannot be used.
        """
        try:
            from mteb.models.model_meta import ModelMeta
        except ImportError as error:
            raise _missing() from error
        self._stored: StoredEncodings | None = None
        if encodings is None:
            self.reranker = as_reranker(model, revision=revision, device=device, **settings)
        else:
            if not isinstance(model, (str, os.PathLike)):
                msg = f"encodings needs a model by name or folder, to store at its settings, but got {type(model).__name__}"
                raise SettingsError(msg)
            stored_as = {**settings, "payload_store": encodings, "storage_mode": "reference"}
            self.reranker = as_reranker(model, revision=revision, device=device, **stored_as)
            storage = make_settings(StorageSettings, settings)
            # A service would have refused the settings.
            opened = cast("KalmReranker", self.reranker)
            self._stored = StoredEncodings(opened, encodings, f"{storage.compression_ratio}:{storage.storage_codec}")
        name = Path(model).name if isinstance(model, (str, os.PathLike)) else type(model).__name__
        facts = {
            "name": f"kalm-integrations/{name}",
            # Results of other weights, or of other encoder settings, are filed apart.
            "revision": fingerprints_of(self.reranker)[-1],
            "experiment_kwargs": settings or None,
            "model_type": ["cross-encoder"],
        }
        self._meta = ModelMeta.create_empty(overwrites=facts)

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """Under which name and revision mteb files results."""
        return self._meta

    def predict(
        self,
        inputs1: Iterable[dict[str, Any]],
        inputs2: Iterable[dict[str, Any]],
        *,
        show_progress_bar: bool = False,
        **task: Any,
    ) -> np.ndarray:
        """Score pairs.

        Args:
            inputs1: batches with the query of each pair as "text", and with its "instruction" if the task has them.
            inputs2: batches with the passage of each pair as "text".
            show_progress_bar: draw a progress bar.
            **task: what mteb says about the task, and its batch size; not used.

        Returns:
            P(yes) in the order of the pairs. Shape: (pairs,).

        Raises:
            NonFiniteScoreError: the model produced NaN or infinite logits.
        """
        del task
        passages = [text for batch in inputs2 for text in batch["text"]]
        queries: list[tuple[str, str | None]] = []
        for batch in inputs1:
            queries.extend(zip(batch["text"], batch.get("instruction", [None] * len(batch["text"])), strict=True))
        known: dict[str, AnyPassage] = {} if self._stored is None else self._stored.get_many(passages, show_progress_bar)
        pairs = [(query, known.get(text, text)) for (query, _), text in zip(queries, passages, strict=True)]
        by_instruction: dict[str | None, list[int]] = {}
        for index, (_, instruction) in enumerate(queries):
            by_instruction.setdefault(instruction, []).append(index)
        scores = np.empty(len(pairs))
        with tqdm(total=len(pairs), desc="Scoring", unit="pair", disable=not show_progress_bar) as progress:
            for instruction, indices in by_instruction.items():
                scored = score_pairs(self.reranker, [pairs[i] for i in indices], instruction, progress.update)
                scores[indices] = [pair.score for pair in scored]
        return scores


@dataclass(frozen=True)
class TaskScores:
    """Main scores of one task, mean over its subsets and splits."""

    task: str
    first_stage: float | None
    """None for a reranking task, which brings its candidates."""
    reranked: float


def choose_tasks(benchmark: str | None, tasks: Sequence[str], without: Sequence[str] = ()) -> list[AbsTask]:
    """Return the tasks of a benchmark, or those that are named.

    Args:
        benchmark: a name that `mteb.get_benchmark` knows.
        tasks: names that `mteb.get_task` knows, in addition.
        without: names of tasks of the benchmark to leave out.

    Raises:
        MissingExtraError: mteb is not installed.
        SettingsError: mteb does not know a name, or nothing is left.
    """
    try:
        import mteb
    except ImportError as error:
        raise _missing() from error
    if benchmark is None and not tasks:
        msg = "there must be tasks to run: name one, such as --task SciFact, or a benchmark, such as --benchmark BEIR"
        raise SettingsError(msg)
    try:
        chosen = [] if benchmark is None else list(mteb.get_benchmark(benchmark).tasks)
        chosen += [mteb.get_task(name) for name in tasks]
    except (KeyError, ValueError) as error:
        # mteb wraps one error in another, whose name it then has in the text.
        reason = str(error.args[0]).removeprefix("KeyError: ")
        msg = (
            f"--benchmark and --task must be names that mteb knows: {reason.rstrip('.')} (`mteb available-benchmarks` and "
            "`mteb available-tasks` list them)"
        )
        raise SettingsError(msg) from error
    unknown = set(without) - {task.metadata.name for task in chosen}
    chosen = [task for task in chosen if task.metadata.name not in without]
    if unknown or not chosen:
        reason = f"{', '.join(sorted(unknown))} is none of them" if unknown else "none is left"
        msg = f"there must be tasks to run, and those left out must be among them, but {reason}"
        raise SettingsError(msg)
    return chosen


def rerank_tasks(
    model: MtebReranker, tasks: Iterable[AbsTask], output: Path, *, first_stage: Any, top_k: int = 100
) -> list[TaskScores]:
    """Evaluate a reranker on a first stage's best passages: mteb's two-stage protocol.

    What is done stays in `output` and is not done again: the first stage's predictions and both stages' results, as mteb
    writes them.

    Args:
        model: reranks.
        tasks: retrieval tasks, whose candidates the first stage finds, and reranking tasks, which bring theirs.
        output: folder.
        first_stage: a model of mteb, or the name of one that `mteb.get_model` knows.
        top_k: candidates per query.

    Raises:
        SettingsError: mteb does not know the first stage, or a task is of another kind.
    """
    import mteb

    name = first_stage if isinstance(first_stage, str) else first_stage.mteb_model_meta.name
    label = name.replace("/", "__")
    found_in = output / label
    scores = []
    for task in tasks:
        found_score: float | None = None
        leaves = list(_leaves(task))
        if any(leaf.metadata.type != "Reranking" for leaf in leaves):
            if isinstance(first_stage, str):
                try:
                    first_stage = mteb.get_model(first_stage)
                except (KeyError, ValueError, OSError) as error:
                    msg = f"the first stage must be a model that mteb knows and can load, but {first_stage!r} is not: {error}"
                    raise SettingsError(msg) from error
            found_score = _find(first_stage, task, leaves, found_in)
            for leaf in leaves:
                leaf.convert_to_reranking(found_in, top_k)
        result = mteb.evaluate(model, task, cache=mteb.ResultCache(output / f"{label}-top{top_k}"), co2_tracker=False)
        for leaf in leaves:
            leaf.unload_data()
        scores.append(TaskScores(task.metadata.name, found_score, float(result.task_results[0].get_score())))
    return scores


def _leaves(task: AbsTask) -> Iterator[AbsTaskRetrieval]:
    """Yield the tasks that an aggregate is made of, or the task itself."""
    if hasattr(task.metadata, "tasks"):
        for part in task.metadata.tasks:
            yield from _leaves(part)
    elif hasattr(task, "convert_to_reranking"):
        yield cast("AbsTaskRetrieval", task)
    else:
        msg = f"a task must be one of retrieval or reranking, but {task.metadata.name} is of type {task.metadata.type}"
        raise SettingsError(msg)


def _find(first_stage: Any, task: AbsTask, leaves: Sequence[AbsTaskRetrieval], folder: Path) -> float:
    """Let the first stage search, unless its predictions are there, and return its score."""
    import mteb

    is_done = all((folder / leaf.prediction_file_name).is_file() for leaf in leaves)
    # Predictions count when all of a task's subsets are written.
    unfinished = folder / "unfinished"
    result = mteb.evaluate(
        first_stage,
        task,
        cache=mteb.ResultCache(folder),
        prediction_folder=unfinished,
        overwrite_strategy="only-missing" if is_done else "always",
        co2_tracker=False,
    )
    for leaf in leaves:
        if not is_done:
            (unfinished / leaf.prediction_file_name).replace(folder / leaf.prediction_file_name)
    return float(result.task_results[0].get_score())


def to_summary(model: MtebReranker, label: str, scores: Sequence[TaskScores], first_stage: str, top_k: int) -> dict[str, Any]:
    """Return scores and what they were measured with as plain values, for JSON."""
    meta = model.mteb_model_meta
    return {
        "label": label,
        "model": str(meta.name).rpartition("/")[2],
        "revision": meta.revision,
        "settings": meta.experiment_kwargs or {},
        "first_stage": first_stage,
        "top_k": top_k,
        "mean": fmean(score.reranked for score in scores),
        "tasks": {score.task: {"first_stage": score.first_stage, "reranked": score.reranked} for score in scores},
    }


def _missing() -> MissingExtraError:
    return MissingExtraError("mteb's tasks need mteb; install it with: pip install mteb")
