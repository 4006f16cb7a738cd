"""`kalm calibrate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kalm_integrations.cli import options
from kalm_integrations.cli.streams import open_output
from kalm_integrations.cli.terminal import note, print_facts, print_json, print_table
from kalm_integrations.corpora.jsonl import to_json


def calibrate(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="A BEIR folder, whose judgements label a first stage's candidates, or a JSONL file of pairs with query, text "
            "and label (1 or 0), gzipped or not.",
        ),
    ],
    split: options.Split = "test",
    model: options.Model = "pico",
    ratio: options.Ratio = None,
    first_stage: options.FirstStage = "bm25",
    skip_missing_queries: options.SkipMissingQueries = False,
    top_k: options.TopK = 20,
    queries: options.Queries = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw of queries and of the half to measure on.")] = 0,
    save: Annotated[bool, typer.Option("--save", help="Write the calibration into the checkpoint, a local folder.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file to write the calibration to.", show_default=False)
    ] = None,
    diagram: Annotated[
        Path | None,
        typer.Option(help="Picture to draw the reliability diagram in, such as calibration.svg.", show_default=False),
    ] = None,
    long_passages: options.LongPassages = None,
    max_windows: options.MaxWindows = None,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Make scores probabilities.

    Temperature and bias are fitted to all pairs. How good that is, is measured with a fit to half of the queries on the other
    half. Calibrate on candidates such as the retriever will find: the bias learns how common relevant passages are among them.
    """
    from kalm_integrations.corpora.first_stage import find_candidates
    from kalm_integrations.evaluation.calibration import (
        calibrate as fit,
    )
    from kalm_integrations.evaluation.calibration import (
        check_savable,
        judge_candidates,
        read_judged,
        save_calibration,
    )

    if save:
        check_savable(model)
    if data.is_dir():
        [collection] = options.read_collections([data], split, [first_stage], skip_missing_queries=skip_missing_queries)
        judged = judge_candidates(collection, find_candidates(collection, first_stage, top_k, queries, seed))
    else:
        judged = read_judged(data)
    reranker = options.open_reranker(
        model,
        revision=revision,
        device=device,
        dtype=dtype,
        compression_ratio=ratio,
        long_passages=long_passages,
        max_windows=max_windows,
    )
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
        print_json({"model": model, **options.fingerprints(reranker), **report.to_dict()})
        return
    print_facts(values)
    print()
    print_table(report.to_table())
