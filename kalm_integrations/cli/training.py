"""`kalm train`, `kalm mine`, `kalm average` and `kalm push`."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kalm_integrations.cli import completion
from kalm_integrations.cli.streams import open_output
from kalm_integrations.cli.terminal import format_bytes, format_seconds, make_table, note, print_facts, print_table
from kalm_integrations.corpora.jsonl import to_json
from kalm_integrations.corpora.text import STREAM
from kalm_integrations.errors import SettingsError

if TYPE_CHECKING:
    from kalm_integrations.training.dry_run import Forecast


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file; paths in it count from its folder.")],
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what the run would do and take, from its data and ten steps, and leave nothing."),
    ] = False,
    held_out: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            help="With --dry-run: a BEIR folder that will be evaluated on, to find its texts in the training data; may be "
            "repeated.",
            show_default="the dev collection",
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Which judgements of --held-out.")] = "test",
) -> None:
    """Train a reranker from a TOML file.

    The folder of the checkpoint is printed at the end. A run that was interrupted goes on where its newest saved step was;
    Ctrl-C and SIGTERM save the step that was reached. To use several GPUs: torchrun --nproc-per-node N -m kalm_integrations
    train CONFIG.
    """
    from kalm_integrations.training.config import TrainConfig

    if held_out and not dry_run:
        msg = f"--held-out is compared by --dry-run, but got {', '.join(map(str, held_out))} without it; add --dry-run"
        raise SettingsError(msg)
    settings = TrainConfig.read(config)
    if dry_run:
        from kalm_integrations.training.dry_run import forecast

        _show(forecast(settings, [(folder, split) for folder in held_out or ()]))
        return
    from kalm_integrations.training.callbacks import TrainingStoppedError
    from kalm_integrations.training.trainer import train as run

    is_first = os.environ.get("RANK", "0") == "0"
    handler = logging.StreamHandler()
    # Of the handler, because libraries turn their own loggers up.
    handler.setLevel(logging.INFO if is_first else logging.WARNING)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=[handler])
    try:
        folder = run(settings)
    except KeyboardInterrupt as stop:
        note(str(stop) or "stopped, with nothing to go on from beside what was saved before")
        raise typer.Exit(128 + stop.number if isinstance(stop, TrainingStoppedError) else 130) from stop
    if is_first:
        print(folder)


def _show(forecast: Forecast) -> None:
    """Print what a run would do and take."""
    table = make_table()
    for column in ("collection", "queries", "passages"):
        table.add_column(column, justify="left" if column == "collection" else "right")
    for name, (n_queries, n_passages) in forecast.collections.items():
        table.add_row(name, f"{n_queries:,}", f"{n_passages:,}")
    print_table(table)
    print()
    table = make_table()
    for column in ("phase", "examples", "steps", "clusters a step", "passes", "a step", "in all"):
        table.add_column(column, justify="right")
    for number, phase in enumerate(forecast.phases, 1):
        passes = phase.n_steps * phase.clusters_per_step / phase.n_examples
        cells = (f"{phase.n_examples:,}", f"{phase.n_steps:,}", f"{phase.clusters_per_step:,}", f"{passes:.2f}")
        table.add_row(str(number), *cells, format_seconds(phase.step_seconds), format_seconds(phase.seconds))
    print_table(table)
    print()
    n_timed = sum(phase.n_timed for phase in forecast.phases)
    facts = {
        "time": f"about {format_seconds(sum(phase.seconds for phase in forecast.phases))}, by {n_timed} steps on this machine",
        "parameters": f"{forecast.n_parameters:,}, of which {forecast.n_trained:,} are trained"
        if forecast.n_trained < forecast.n_parameters
        else f"{forecast.n_parameters:,}",
        "disk": f"{format_bytes(forecast.peak_bytes)} at most, {format_bytes(forecast.kept_bytes)} in the end; "
        f"{format_bytes(forecast.free_bytes)} are free",
    }
    print_facts(facts)
    for line in forecast.cuts:
        print(f"cut: {line}")
    for name, overlap in forecast.overlaps.items():
        print(f"overlap with {name}: {overlap}")


def mine(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A BEIR folder, or training data in any format that kalm train reads.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSONL file to write, gzipped if it is named .gz; - is standard output.")
    ] = STREAM,
    method: Annotated[
        Literal["bm25", "bi-encoder", "same-title"],
        typer.Option(
            help="bm25 and bi-encoder: passages found for the query. same-title: other passages of the positive's document."
        ),
    ] = "bm25",
    encoder: Annotated[
        str | None, typer.Option(help="For bi-encoder: a sentence-transformers model, folder or hub id.", show_default="none")
    ] = None,
    negatives: Annotated[int, typer.Option(min=1, help="How many per query at most.")] = 15,
    depth: Annotated[int, typer.Option(min=1, help="How many of the first candidates they are drawn from.")] = 100,
    skip: Annotated[
        int, typer.Option(min=0, help="How many of the very first to leave out, which may answer the query unmarked.")
    ] = 0,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="A model whose margins are written too: alias, folder or hub id.",
            show_default="none",
            autocompletion=completion.models,
        ),
    ] = None,
    teacher_kind: Annotated[
        Literal["kalm", "cross-encoder", "bi-encoder"], typer.Option(help="What the teacher is.")
    ] = "kalm",
    below_positive: Annotated[
        float | None,
        typer.Option(
            help="With a teacher: leave out candidates whose margin is not this much below the best positive's.",
            show_default="none",
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Which judgements of a BEIR folder, or which split of a dataset.")] = "train",
    instruction: Annotated[
        str | None, typer.Option(help="Instruction of queries that bring none.", show_default="the checkpoint's")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw.")] = 0,
) -> None:
    """Find hard negatives for training.

    Writes one line per query, as `kalm train` reads them: query, positives, negatives, and with a teacher its margins.
    Queries for which nothing is found are left out.
    """
    from tqdm.auto import tqdm

    from kalm_integrations.training.config import CollectionConfig
    from kalm_integrations.training.mining import MiningSettings
    from kalm_integrations.training.mining import mine as run
    from kalm_integrations.training.teachers import load_teacher

    if teacher is None and below_positive is not None:
        msg = "--below-positive compares a teacher's margins, but there is no --teacher; name one"
        raise SettingsError(msg)
    if (method == "bi-encoder") != (encoder is not None):
        msg = f"--encoder and --method bi-encoder come together, but got --method {method} and --encoder {encoder}"
        raise SettingsError(msg)
    settings = MiningSettings(negatives, depth, skip, below_positive, seed)
    collection = CollectionConfig(path=source, split=split, instruction=instruction)
    judge = load_teacher(teacher, teacher_kind) if teacher is not None else None
    n_lines = n_negatives = 0
    with open_output(output) as file:
        for line in tqdm(run(collection, method, settings, encoder, judge), "Mining", unit="query", disable=None):
            file.write(to_json(line) + b"\n")
            n_lines += 1
            n_negatives += len(line["negatives"])
    note(f"{n_lines:,} queries with {n_negatives:,} negatives written")


def average(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="Two or more checkpoints: folders, hub ids or aliases.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; a checkpoint that is there is replaced.")],
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option(help="What the weights are written in; bfloat16 takes half the space and rounds them."),
    ] = "float32",
) -> None:
    """Average the weights of checkpoints.

    They must come from the same start: runs with other data, seeds or settings. Often their mean is better than each.
    """
    from kalm_integrations.training.exporting import average_checkpoints

    print(average_checkpoints(models, output, dtype))


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the checkpoint.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Where it goes on the hub: owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a repository that only its owner can read.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to write to, which is made if it is not there.", show_default="main")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.", show_default="Upload a reranker")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be uploaded, and upload nothing.")] = False,
) -> None:
    """Publish a checkpoint on the hub.

    The repository is made if it is not there, and its address is printed. Only files of a checkpoint are uploaded. Log in with
    `hf auth login`, or set HF_TOKEN.
    """
    from kalm_integrations.training.publishing import check_publishable
    from kalm_integrations.training.publishing import push as run

    checkpoint = check_publishable(folder)
    if checkpoint.others:
        note(f"left out, as no part of a checkpoint: {', '.join(checkpoint.others)}")
    if dry_run:
        table = make_table()
        table.add_column("file")
        table.add_column("size", justify="right")
        for path in checkpoint.files:
            table.add_row(path.name, format_bytes(path.stat().st_size))
        print_table(table)
        return
    print(run(checkpoint, repo_id, private=private, revision=revision, message=message))
