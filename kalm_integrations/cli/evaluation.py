"""The commands of `kalm eval`."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kalm_integrations.cli import completion, options
from kalm_integrations.cli.terminal import note, print_json, print_table
from kalm_integrations.corpora.jsonl import to_json

if TYPE_CHECKING:
    from kalm_integrations.core.reranker import KalmReranker

FoldersArgument = Annotated[
    list[Path], typer.Argument(metavar="FOLDER", help="BEIR folders: corpus.jsonl, queries.jsonl, qrels/<split>.tsv.")
]

app = typer.Typer(rich_markup_mode=None)


@app.callback()
def evaluation() -> None:
    """Measure rankings."""


@app.command()
def beir(
    folders: FoldersArgument,
    split: options.Split = "test",
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="nano, small, large, nano-r2, small-r2, large-r2, a hub id or a local folder; pico is built in and small, "
            "for trying things out. May be repeated: each is compared with the first one, too.",
            show_default="pico",
            autocompletion=completion.models,
        ),
    ] = None,
    ratios: options.Ratios = "1,2,4,8,16,32",
    codecs: options.Codecs = "rot4",
    first_stage: options.FirstStage = "bm25",
    skip_missing_queries: options.SkipMissingQueries = False,
    other_run: Annotated[
        list[str] | None,
        typer.Option(
            help="A TREC run file to compare with as it is, with its own passages, the --top-k best; may be repeated. "
            "{collection} stands for the folder's name."
        ),
    ] = None,
    cross_encoder: Annotated[
        list[str] | None, typer.Option(help="A cross-encoder of sentence-transformers to compare with; may be repeated.")
    ] = None,
    bi_encoder: Annotated[
        list[str] | None, typer.Option(help="A bi-encoder of sentence-transformers to compare with; may be repeated.")
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            help="A measure of ir-measures, such as RR@10 or R@100; may be repeated. Differences are of the first.",
            show_default="nDCG@10",
        ),
    ] = None,
    top_k: options.TopK = 20,
    queries: options.Queries = None,
    seed: options.Seed = 0,
    runs: Annotated[Path | None, typer.Option(help="Folder to write every order to, as TREC run files.")] = None,
    long_passages: options.LongPassages = None,
    max_windows: options.MaxWindows = None,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Compare orders of BEIR collections.

    By ratio and codec, two orders of each --model are compared with the first stage's, and with those of other models: the
    reranker's own, and that of the sum of both stages' z-scores. Differences come with a 95 % interval (paired bootstrap over
    the queries). Each different candidate is encoded once and kept in memory: for large collections draw --queries, or leave
    out ratio 1.
    """
    from kalm_integrations.evaluation.report import DEFAULT_MEASURE, evaluate

    chosen_ratios, chosen_codecs = options.parse_ratios(ratios), options.parse_codecs(codecs)
    labels = _label(models or ["pico"])
    if revision is not None and len(labels) > 1:
        msg = f"is of one --model, but there are {len(labels)}"
        raise typer.BadParameter(msg, param_hint="--revision")
    first_stages = [first_stage, *(other_run or ())]
    collections = options.read_collections(folders, split, first_stages, skip_missing_queries=skip_missing_queries)

    def open_at(model: str, compression_ratio: int) -> KalmReranker:
        settings = {"revision": revision, "device": device, "dtype": dtype, "storage_codec": "fp32", "cache_bytes": 0}
        long = {"long_passages": long_passages, "max_windows": max_windows}
        return options.open_reranker(model, compression_ratio=compression_ratio, **settings, **long)

    # At the coarsest ratio: says before any work what cannot be opened, and what was not trained for it.
    opened = [
        {"label": label, "model": model, **options.fingerprints(open_at(model, max(chosen_ratios)))}
        for label, model in labels.items()
    ]
    openers = {label: partial(open_at, model, math.gcd(*chosen_ratios)) for label, model in labels.items()}
    # One alone is kept for all collections.
    rerankers = openers if len(openers) > 1 else next(iter(openers.values()))()
    reports = []
    for collection in collections:
        report = evaluate(
            rerankers,
            collection,
            ratios=chosen_ratios,
            codecs=chosen_codecs,
            first_stage=first_stage,
            other_runs=other_run or (),
            cross_encoders=cross_encoder or (),
            bi_encoders=bi_encoder or (),
            measures=measure or [DEFAULT_MEASURE],
            top_k=top_k,
            n_queries=queries,
            seed=seed,
            run_folder=runs,
            show_progress=sys.stderr.isatty(),
        )
        reports.append(report)
        if not as_json:
            print_table(report.to_table())
    if as_json:
        first = {name: value for name, value in opened[0].items() if name != "label"}
        print_json({**first, "models": opened, "collections": [report.to_dict() for report in reports]})
        return
    n_encoded = len(opened) * sum(report.n_passages for report in reports)
    _note_times(n_encoded, sum(r.encode_seconds for r in reports), sum(r.score_seconds for r in reports))


def _label(models: Sequence[str]) -> dict[str, str]:
    """Return models by what tables call them: the last part of a path or hub id, or the whole where several share it."""
    chosen = list(dict.fromkeys(models))
    names = [Path(model).name for model in chosen]
    return {name if names.count(name) == 1 else model: model for name, model in zip(names, chosen, strict=True)}


@app.command()
def mteb(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for results, predictions and encodings; a later run goes on there.")
    ],
    benchmark: Annotated[
        str | None, typer.Option(help="A benchmark of mteb, such as BEIR or LMEB.", show_default="none")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="A task of mteb; may be repeated.")] = None,
    without: Annotated[list[str] | None, typer.Option(help="A task of the benchmark to leave out; may be repeated.")] = None,
    model: options.Model = "pico",
    first_stage: Annotated[
        str, typer.Option(help="The model of mteb that finds candidates, where the task does not bring them.")
    ] = "KaLM-Embedding/KaLM-embedding-multilingual-mini-instruct-v2.5",
    top_k: options.TopK = 100,
    ratio: options.Ratio = 4,
    codec: options.Codec = "rot4",
    label: Annotated[str | None, typer.Option(help="Name of the summary.", show_default="the benchmark's or task's")] = None,
    long_passages: options.LongPassages = None,
    max_windows: options.MaxWindows = None,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Evaluate on tasks of mteb.

    A first stage finds candidates, the reranker reorders them, and mteb computes each task's main score. Every passage is
    encoded once and its encoding kept in the output folder, so that later runs, also at other query settings, encode
    nothing. OUTPUT/LABEL.json has the summary.
    """
    from kalm_integrations.evaluation.mteb import MtebReranker, choose_tasks, rerank_tasks, to_summary

    tasks = choose_tasks(benchmark, task or (), without or ())
    given = {"dtype": dtype, "long_passages": long_passages, "max_windows": max_windows}
    settings: dict[str, Any] = {"compression_ratio": ratio, "storage_codec": codec}
    # Results are filed under what was given.
    settings |= {name: value for name, value in given.items() if value is not None}
    reranker = MtebReranker(model, revision, device, encodings=output / "encodings", **settings)
    scores = rerank_tasks(reranker, tasks, output, first_stage=first_stage, top_k=top_k)
    name = label or benchmark or "-".join(task or ())
    summary = to_summary(reranker, name, scores, first_stage, top_k)
    (output / f"{name.replace('/', '_')}.json").write_bytes(to_json(summary, indent=2) + b"\n")
    if as_json:
        print_json(summary)
        return
    rows = {score.task: score for score in scores}
    for task_name, score in rows.items():
        before = "" if score.first_stage is None else f"{100 * score.first_stage:6.2f} -> "
        print(f"{task_name:<40} {before}{100 * score.reranked:6.2f}")
    print(f"{'mean':<40} {100 * summary['mean']:6.2f}")


@app.command()
def compression(
    folders: FoldersArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for compression.json and compression.svg.")],
    split: options.Split = "test",
    model: options.Model = "pico",
    ratios: options.Ratios = "1,2,4,8,16,32",
    codecs: options.Codecs = "fp32,fp16,bf16,int8,rot4,rot3,rot2",
    first_stage: options.FirstStage = "bm25",
    skip_missing_queries: options.SkipMissingQueries = False,
    top_k: options.TopK = 20,
    queries: options.Queries = None,
    seed: options.Seed = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of timing.")] = 5,
    long_passages: options.LongPassages = None,
    max_windows: options.MaxWindows = None,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Measure what ratio and codec cost.

    For every ratio and codec: nDCG@10 and its difference to ratio 1 in float32 with a 95 % interval (paired bootstrap over
    the queries), how far scores move and orders agree (Kendall's tau), bytes per passage, and the time to read and score 100
    candidates. Each different candidate is encoded once, at ratio 1, and kept in memory: for large collections draw
    --queries.
    """
    from kalm_integrations.evaluation.compression import measure_costs, to_markdown, to_report
    from kalm_integrations.evaluation.plots import plot_costs

    chosen_ratios, chosen_codecs = options.parse_ratios(ratios), options.parse_codecs(codecs)
    collections = options.read_collections(folders, split, [first_stage], skip_missing_queries=skip_missing_queries)
    settings = {
        "revision": revision,
        "device": device,
        "dtype": dtype,
        "compression_ratio": 1,
        "storage_codec": "fp32",
        "cache_bytes": 0,
        "long_passages": long_passages,
        "max_windows": max_windows,
    }
    # Prefix states in float32, too, so that the codecs to be measured are all that is lossy.
    reranker = options.open_reranker(model, **settings, prefix_dtype="float32")
    timed_reranker = options.open_reranker(model, **settings, prefix_cache_bytes=0)
    costs = [
        measure_costs(
            reranker,
            collection,
            ratios=chosen_ratios,
            codecs=chosen_codecs,
            first_stage=first_stage,
            top_k=top_k,
            n_queries=queries,
            seed=seed,
            rounds=rounds,
            timed_reranker=timed_reranker,
            show_progress=sys.stderr.isatty(),
        )
        for collection in collections
    ]
    report = to_report(model, reranker, costs)
    output.mkdir(parents=True, exist_ok=True)
    (output / "compression.json").write_bytes(to_json(report, indent=2) + b"\n")
    plot_costs(report, output / "compression.svg")
    print(to_markdown(report))


@app.command()
def fusion(
    folders: FoldersArgument,
    split: options.Split = "test",
    model: options.Model = "pico",
    ratio: options.Ratio = None,
    weights: Annotated[
        str, typer.Option(help="The reranker's shares to compare, from 0 to 1.")
    ] = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9",
    first_stage: options.FirstStage = "bm25",
    skip_missing_queries: options.SkipMissingQueries = False,
    top_k: options.TopK = 20,
    queries: options.Queries = None,
    seed: options.Seed = 0,
    long_passages: options.LongPassages = None,
    max_windows: options.MaxWindows = None,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Compare ways to fuse both stages' scores.

    By method and weight, the fused order is compared with the first stage's and with the reranker's own: nDCG@10, differences
    with a 95 % interval (paired bootstrap over the queries).
    """
    from kalm_integrations.evaluation.fusion import compare_fusions

    shares = options.parse_list(weights, "--weights", "numbers from 0 to 1 such as 0.4,0.6", float)
    collections = options.read_collections(folders, split, [first_stage], skip_missing_queries=skip_missing_queries)
    reranker = options.open_reranker(
        model,
        revision=revision,
        device=device,
        dtype=dtype,
        compression_ratio=ratio,
        cache_bytes=0,
        long_passages=long_passages,
        max_windows=max_windows,
    )
    reports = []
    for collection in collections:
        report = compare_fusions(
            reranker,
            collection,
            weights=shares,
            first_stage=first_stage,
            top_k=top_k,
            n_queries=queries,
            seed=seed,
            show_progress=sys.stderr.isatty(),
        )
        reports.append(report.to_dict())
        if not as_json:
            print_table(report.to_table())
    if as_json:
        print_json({"model": model, **options.fingerprints(reranker), "collections": reports})
        return
    stats = reranker.stats
    _note_times(stats.passages_encoded, stats.encode_seconds, stats.score_seconds)


def _note_times(n_encoded: int, encode_seconds: float, score_seconds: float) -> None:
    note(f"{n_encoded:,} passages encoded in {encode_seconds:.1f} s, scored in {score_seconds:.1f} s")
