"""The commands of `kalm eval`, and `kalm calibrate`.

Heavy imports stand inside the commands, so that help comes at once.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from kalm_integrations.corpora.jsonl import to_json
from kalm_integrations.terminal import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    RevisionOption,
    note,
    open_output,
    open_reranker,
    parse_list,
    parse_numbers,
    print_facts,
    print_json,
    print_table,
)

FoldersArgument = Annotated[
    list[Path], typer.Argument(metavar="FOLDER", help="BEIR folders: corpus.jsonl, queries.jsonl, qrels/<split>.tsv.")
]
SplitOption = Annotated[str, typer.Option(help="Which judgements.")]
RatiosOption = Annotated[str, typer.Option(help="Compression ratios to compare.")]
FirstStageOption = Annotated[
    str,
    typer.Option(
        help="Where candidates come from: bm25, a TREC run file ({collection} in its path stands for the folder's name), or a "
        "bi-encoder of sentence-transformers."
    ),
]
TopKOption = Annotated[int, typer.Option(min=1, help="Candidates per query, the best of the first stage.")]
QueriesOption = Annotated[int | None, typer.Option(min=1, help="How many queries to draw.", show_default="all")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Rounds of timing.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of the draw and of the bootstrap.")]

app = typer.Typer(rich_markup_mode=None)


@app.callback()
def evaluation() -> None:
    """Measure rankings."""


@app.command()
def beir(
    folders: FoldersArgument,
    split: SplitOption = "test",
    model: ModelOption = "pico",
    ratios: RatiosOption = "1,2,4,8,16,32",
    codecs: Annotated[str | None, typer.Option(help="Codecs to compare.", show_default="fp16")] = None,
    first_stage: FirstStageOption = "bm25",
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
    top_k: TopKOption = 20,
    queries: QueriesOption = None,
    seed: SeedOption = 0,
    runs: Annotated[Path | None, typer.Option(help="Folder to write every order to, as TREC run files.")] = None,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare orders of BEIR collections.

    By ratio and codec, two orders are compared with the first stage's, and with those of other models: the reranker's own,
    and that of the sum of both stages' z-scores. Differences come with a 95 % interval (paired bootstrap over the queries).
    Each different candidate is encoded once and kept in memory: for large collections draw --queries, or leave out ratio 1.
    """
    from kalm_integrations.core.settings import DEFAULT_CODEC
    from kalm_integrations.corpora.beir import Collection
    from kalm_integrations.evaluation.report import DEFAULT_MEASURE, evaluate

    chosen = parse_numbers(ratios, "--ratios")
    collections = [Collection.read(folder, split) for folder in folders]
    reranker = open_reranker(
        model, revision=revision, device=device, dtype=dtype, compression_ratio=math.gcd(*chosen), cache_bytes=0
    )
    reports = []
    for collection in collections:
        report = evaluate(
            reranker,
            collection,
            ratios=chosen,
            codecs=[DEFAULT_CODEC] if codecs is None else parse_list(codecs, "--codecs"),
            first_stage=first_stage,
            cross_encoders=cross_encoder or (),
            bi_encoders=bi_encoder or (),
            measures=measure or [DEFAULT_MEASURE],
            top_k=top_k,
            n_queries=queries,
            seed=seed,
            run_folder=runs,
            show_progress=sys.stderr.isatty(),
        )
        reports.append(report.to_dict())
        if not as_json:
            print_table(report.to_table())
            note(
                f"{report.n_passages:,} passages encoded in {report.encode_seconds:.1f} s, "
                f"scored in {report.score_seconds:.1f} s"
            )
    if as_json:
        print_json({"model": model, "fingerprint": reranker.fingerprint, "collections": reports})


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
    model: ModelOption = "pico",
    first_stage: Annotated[
        str, typer.Option(help="The model of mteb that finds candidates, where the task does not bring them.")
    ] = "KaLM-Embedding/KaLM-embedding-multilingual-mini-instruct-v2.5",
    top_k: TopKOption = 100,
    ratio: Annotated[int, typer.Option(min=1, help="Compression ratio.")] = 4,
    codec: Annotated[str, typer.Option(help="How encodings are kept: fp32, fp16, bf16, int8 or int4.")] = "fp16",
    label: Annotated[str | None, typer.Option(help="Name of the summary.", show_default="the benchmark's or task's")] = None,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate on tasks of mteb.

    A first stage finds candidates, the reranker reorders them, and mteb computes each task's main score. Every passage is
    encoded once and its encoding kept in the output folder, so that later runs, also at other query settings, encode
    nothing. OUTPUT/LABEL.json has the summary.
    """
    from kalm_integrations.evaluation.mteb import MtebReranker, choose_tasks, rerank_tasks, to_summary

    tasks = choose_tasks(benchmark, task or (), without or ())
    settings = {"compression_ratio": ratio, "storage_codec": codec, **({} if dtype is None else {"dtype": dtype})}
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
        typer.echo(f"{task_name:<40} {before}{100 * score.reranked:6.2f}")
    typer.echo(f"{'mean':<40} {100 * summary['mean']:6.2f}")


@app.command()
def compression(
    folders: FoldersArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for compression.json and compression.svg.")],
    split: SplitOption = "test",
    model: ModelOption = "pico",
    ratios: RatiosOption = "1,2,4,8,16,32",
    codecs: Annotated[str, typer.Option(help="Codecs to compare.")] = "fp32,fp16,bf16,int8,int4",
    first_stage: FirstStageOption = "bm25",
    top_k: TopKOption = 20,
    queries: QueriesOption = None,
    seed: SeedOption = 0,
    rounds: RoundsOption = 5,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Measure what ratio and codec cost.

    For every ratio and codec: nDCG@10 and its difference to ratio 1 in float32 with a 95 % interval (paired bootstrap over
    the queries), how far scores move and orders agree (Kendall's tau), bytes per passage, and the time to read and score 100
    candidates. Each different candidate is encoded once, at ratio 1, and kept in memory: for large collections draw
    --queries.
    """
    from kalm_integrations.corpora.beir import Collection
    from kalm_integrations.evaluation.compression import measure_costs, to_markdown, to_report
    from kalm_integrations.evaluation.plots import plot_costs

    chosen = parse_numbers(ratios, "--ratios")
    collections = [Collection.read(folder, split) for folder in folders]
    settings = {"revision": revision, "device": device, "dtype": dtype, "compression_ratio": 1, "cache_bytes": 0}
    # In float32, so that codecs are all that is lossy.
    reranker = open_reranker(model, **settings, prefix_dtype="float32")
    timed_reranker = open_reranker(model, **settings, prefix_cache_bytes=0)
    costs = [
        measure_costs(
            reranker,
            collection,
            ratios=chosen,
            codecs=parse_list(codecs, "--codecs"),
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
    typer.echo(to_markdown(report))


@app.command()
def fusion(
    folders: FoldersArgument,
    split: SplitOption = "test",
    model: ModelOption = "pico",
    ratio: Annotated[int | None, typer.Option(help="Tokens per stored state.", show_default="4")] = None,
    weights: Annotated[
        str, typer.Option(help="The reranker's shares to compare, from 0 to 1.")
    ] = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9",
    first_stage: FirstStageOption = "bm25",
    top_k: TopKOption = 20,
    queries: QueriesOption = None,
    seed: SeedOption = 0,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare ways to fuse both stages' scores.

    By method and weight, the fused order is compared with the first stage's and with the reranker's own: nDCG@10, differences
    with a 95 % interval (paired bootstrap over the queries).
    """
    from kalm_integrations.corpora.beir import Collection
    from kalm_integrations.evaluation.fusion import compare_fusions

    shares = [_to_share(part) for part in parse_list(weights, "--weights")]
    collections = [Collection.read(folder, split) for folder in folders]
    reranker = open_reranker(model, revision=revision, device=device, dtype=dtype, compression_ratio=ratio, cache_bytes=0)
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
        print_json({"model": model, "fingerprint": reranker.fingerprint, "collections": reports})


def calibrate(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="A BEIR folder, whose judgements label a first stage's candidates, or a JSONL file of pairs with query, text "
            "and label (1 or 0).",
        ),
    ],
    split: SplitOption = "test",
    model: ModelOption = "pico",
    ratio: Annotated[int | None, typer.Option(help="Tokens per stored state.", show_default="4")] = None,
    first_stage: FirstStageOption = "bm25",
    top_k: TopKOption = 20,
    queries: QueriesOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw of queries and of the half to measure on.")] = 0,
    save: Annotated[bool, typer.Option("--save", help="Write the calibration into the checkpoint, a local folder.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file to write the calibration to.", show_default=False)
    ] = None,
    diagram: Annotated[
        Path | None,
        typer.Option(help="Picture to draw the reliability diagram in, such as calibration.svg.", show_default=False),
    ] = None,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make scores probabilities.

    Temperature and bias are fitted to all pairs. How good that is, is measured with a fit to half of the queries on the other
    half. Calibrate on candidates such as the retriever will find: the bias learns how common relevant passages are among them.
    """
    from kalm_integrations.corpora.beir import Collection
    from kalm_integrations.evaluation.calibration import (
        calibrate as fit,
    )
    from kalm_integrations.evaluation.calibration import (
        check_savable,
        judge_candidates,
        read_judged,
        save_calibration,
    )
    from kalm_integrations.evaluation.candidates import find_candidates

    if save:
        check_savable(model)
    if data.is_dir():
        collection = Collection.read(data, split)
        judged = judge_candidates(collection, find_candidates(collection, first_stage, top_k, queries, seed))
    else:
        judged = read_judged(data)
    reranker = open_reranker(model, revision=revision, device=device, dtype=dtype, compression_ratio=ratio)
    report = fit(reranker, judged, seed=seed, show_progress=sys.stderr.isatty())
    values = report.calibration.model_dump()
    if diagram is not None:
        report.save_diagram(diagram)
    if output is not None:
        with open_output(output) as file:
            file.write(to_json(values, indent=2) + b"\n")
    if save:
        note(f"saved into {save_calibration(model, report.calibration)}")
    if as_json:
        print_json({"model": model, "fingerprint": reranker.fingerprint, **report.to_dict()})
        return
    print_facts(values)
    typer.echo()
    print_table(report.to_table())


def _to_share(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        msg = f"must be numbers from 0 to 1 such as 0.4,0.6, but got {text!r}"
        raise typer.BadParameter(msg, param_hint="--weights") from error


@app.command()
def screen(
    folders: Annotated[list[Path] | None, typer.Argument(metavar="FOLDER", help="BEIR folders, for the quality.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file to write.", show_default="only the tables are printed")
    ] = None,
    split: SplitOption = "test",
    model: ModelOption = "pico",
    timed_model: Annotated[
        str | None, typer.Option(help="Take the times with another checkpoint.", show_default="that of --model")
    ] = None,
    coarse_ratio: Annotated[int, typer.Option(min=2, help="Ratio of the screen.")] = 32,
    fine_ratio: Annotated[int, typer.Option(min=1, help="Ratio of the final ranking.")] = 4,
    keep: Annotated[int, typer.Option(min=1, help="Candidates that the screen keeps.")] = 20,
    lengths: Annotated[str, typer.Option(help="Passage lengths to time, in tokens.")] = "256,512,1024,2048,4096",
    first_stage: FirstStageOption = "bm25",
    top_k: TopKOption = 100,
    queries: QueriesOption = None,
    seed: SeedOption = 0,
    rounds: RoundsOption = 3,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Measure a coarse-to-fine screen.

    All candidates are ranked at the coarse ratio, and the best of them again at the fine one. Shown are how many of the fine
    ranking's ten best such a screen keeps, the nDCG@10 it leaves, and the time it saves by passage length.
    """
    from kalm_integrations.corpora.beir import Collection
    from kalm_integrations.evaluation.screen import ScreenReport, find_crossover, measure_quality, measure_times, to_markdown

    collections = [Collection.read(folder, split) for folder in folders or ()]
    settings = {"device": device, "dtype": dtype, "compression_ratio": fine_ratio, "cache_bytes": 0}
    reranker = open_reranker(model, **settings)
    qualities = [
        measure_quality(
            reranker,
            collection,
            coarse_ratio=coarse_ratio,
            fine_ratio=fine_ratio,
            n_kept=keep,
            first_stage=first_stage,
            top_k=top_k,
            n_queries=queries,
            seed=seed,
            show_progress=sys.stderr.isatty(),
        )
        for collection in collections
    ]
    timed = open_reranker(timed_model or model, **settings, prefix_cache_bytes=0)
    times = measure_times(
        timed,
        lengths=parse_numbers(lengths, "--lengths"),
        coarse_ratio=coarse_ratio,
        fine_ratio=fine_ratio,
        n_kept=keep,
        n_candidates=top_k,
        rounds=rounds,
        seed=seed,
    )
    name = Path(timed_model or model).name
    crossover = find_crossover(times)
    report = ScreenReport(name, top_k, coarse_ratio, fine_ratio, keep, tuple(qualities), times, crossover)
    if output is not None:
        output.write_bytes(to_json(report.to_dict(), indent=2) + b"\n")
    typer.echo(to_markdown(report.to_dict()))
