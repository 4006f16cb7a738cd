"""`kalm rerank`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from kalm_integrations.cli import options, ranking
from kalm_integrations.cli.terminal import make_table, print_json, print_table, printable
from kalm_integrations.core.types import RankedPassage
from kalm_integrations.corpora.candidates import Candidate
from kalm_integrations.corpora.text import STREAM

if TYPE_CHECKING:
    from rich.table import Table


def rerank(
    query: ranking.Query,
    passages: ranking.Passages = STREAM,
    model: options.ModelOrService = "pico",
    top_k: Annotated[int | None, typer.Option(min=1, help="How many to show at most.", show_default="all")] = None,
    score_threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Leave out passages that score less.", show_default="none")
    ] = None,
    instruction: ranking.Instruction = None,
    spans: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many of the best come with the scores of their sentences; the table shows each one's best sentence.",
            show_default="none",
        ),
    ] = None,
    ratio: options.Ratio = None,
    long_passages: options.LongPassages = None,
    max_windows: options.MaxWindows = None,
    text_field: options.TextField = "text",
    title_field: options.TitleField = "title",
    payload_store: options.PayloadStore = None,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    api_key_env: options.ApiKeyEnv = None,
    skip_bad: options.SkipBad = False,
    as_json: options.Json = False,
) -> None:
    """Rank passages for a query, best first.

    A row that carries an encoding (made by `kalm encode` or by an adapter) is scored from it, without running the encoder.
    Rows without one, or with one of another text or model, are encoded now. Of a passage in windows, the characters of the
    window that scores best are shown.
    """
    ranking.check_query(query)
    candidates = ranking.read_passages(passages, text_field, title_field, skip_bad=skip_bad)
    reranker = ranking.open_model(
        model,
        api_key_env,
        payload_store,
        revision=revision,
        device=device,
        dtype=dtype,
        compression_ratio=ratio,
        long_passages=long_passages,
        max_windows=max_windows,
    )
    given = [candidate.passage for candidate in candidates]
    ranked = reranker.rank(query, given, top_k, score_threshold, instruction, spans=spans)
    stats = reranker.stats
    if as_json:
        results = [ranking.to_dict(passage, candidates[passage.index]) for passage in ranked]
        print_json({"query": query, "results": results, "stats": stats.to_dict()})
        return
    if ranked:
        print_table(_to_table(ranked, candidates))
    ranking.note_encodings(len(ranked), len(candidates), stats)


def _to_table(ranked: Sequence[RankedPassage], candidates: Sequence[Candidate]) -> Table:
    from rich.text import Text

    kind, names = ranking.names_of(candidates)
    table = make_table()
    has_windows = any(passage.window is not None for passage in ranked)
    for name in ("rank", "score", "margin", *(["window"] if has_windows else ()), kind):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("passage")
    for rank, passage in enumerate(ranked, 1):
        shown = candidates[passage.index].text
        if passage.spans:
            shown = shown[passage.spans[0].start : passage.spans[0].end]
        elif passage.window is not None:
            shown = shown[slice(*passage.window)]
        numbers = [str(rank), f"{passage.score:.4f}", f"{passage.margin:+.2f}"]
        if has_windows:
            numbers.append("" if passage.window is None else "{:,}-{:,}".format(*passage.window))
        # Cut in the cell, not by the column, so that a narrow terminal leaves the numbers whole.
        text = Text(printable(shown), no_wrap=True, overflow="ellipsis")
        table.add_row(*numbers, Text(printable(names[passage.index])), text)
    return table
