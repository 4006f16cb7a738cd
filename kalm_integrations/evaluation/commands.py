"""The commands of `kalm eval`.

Heavy imports stand inside the commands, so that help comes at once.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from kalm_integrations.terminal import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    RevisionOption,
    note,
    open_reranker,
    parse_list,
    parse_numbers,
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
    from kalm_integrations.evaluation.beir import Collection
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
