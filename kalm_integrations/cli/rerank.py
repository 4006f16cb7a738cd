"""`kalm rerank`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kalm_integrations.cli import options
from kalm_integrations.cli.terminal import make_table, note, print_json, print_table, printable, report_bad
from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY, RankedPassage
from kalm_integrations.corpora.candidates import Candidate, read_candidates
from kalm_integrations.corpora.jsonl import PassageFields
from kalm_integrations.corpora.text import STREAM
from kalm_integrations.errors import SettingsError
from kalm_integrations.remote.address import is_address

if TYPE_CHECKING:
    from rich.table import Table

    from kalm_integrations.core.base import Reranker


def rerank(
    query: Annotated[str, typer.Argument(metavar="QUERY", help="The query.")],
    passages: Annotated[
        Path,
        typer.Argument(
            metavar="PASSAGES",
            help="File of passages, gzipped or not, or - for standard input: CSV or TSV with a header row if it is named .csv "
            "or .tsv, one passage a line if it is named .txt, JSONL if it is named .jsonl or .ndjson; otherwise JSONL or a "
            "JSON array if it begins like one, else one passage a line.",
        ),
    ] = STREAM,
    model: options.ModelOrService = "pico",
    top_k: Annotated[int | None, typer.Option(min=1, help="How many to show at most.", show_default="all")] = None,
    score_threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Leave out passages that score less.", show_default="none")
    ] = None,
    instruction: Annotated[
        str | None, typer.Option(help="What makes a passage relevant.", show_default="the checkpoint's")
    ] = None,
    ratio: options.Ratio = None,
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
    Rows without one, or with one of another text or model, are encoded now.
    """
    if not query.strip():
        msg = "the query must hold a word at least, but is empty"
        raise SettingsError(msg)
    fields = PassageFields(text_field, title_field or None)
    candidates = list(read_candidates(passages, fields, report_bad if skip_bad else None, takes_plain_lines=True))
    store = options.existing(payload_store)
    settings: dict[str, Any] = {
        "revision": revision,
        "device": device,
        "dtype": dtype,
        "compression_ratio": ratio,
        "payload_store": store,
    }
    reranker: Reranker = (
        options.open_service(model, api_key_env, **settings) if is_address(model) else options.open_reranker(model, **settings)
    )
    ranked = reranker.rank(query, [candidate.passage for candidate in candidates], top_k, score_threshold, instruction)
    stats = reranker.stats
    if as_json:
        results = [_to_dict(passage, candidates[passage.index]) for passage in ranked]
        print_json({"query": query, "results": results, "stats": stats.to_dict()})
        return
    if ranked:
        print_table(_to_table(ranked, candidates))
    oddities = (("coarser than asked for", stats.coarser), ("stale", stats.stale), ("corrupt", stats.corrupt))
    details = "".join(f", {count:,} {name}" for name, count in oddities if count)
    note(
        f"{len(ranked):,} of {len(candidates):,} passages; encodings: {stats.metadata_hits:,} stored ones used, "
        f"{stats.passages_encoded:,} made now{details}"
    )


def _to_dict(passage: RankedPassage, candidate: Candidate) -> dict[str, Any]:
    """Return a result for JSON: numbers plain, the row without its encoding; the text is in the row."""
    numbers = {name: value for name, value in passage.to_dict().items() if name != "text"}
    row = {key: value for key, value in candidate.row.items() if key not in (ENCODING_KEY, FINGERPRINT_KEY)}
    return {**numbers, "line": candidate.number, "row": row}


def _to_table(ranked: Sequence[RankedPassage], candidates: Sequence[Candidate]) -> Table:
    from rich.text import Text

    has_ids = all("_id" in candidate.row for candidate in candidates)
    table = make_table()
    for name in ("rank", "score", "margin", "_id" if has_ids else "line"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("passage")
    for rank, passage in enumerate(ranked, 1):
        candidate = candidates[passage.index]
        name = str(candidate.row["_id"] if has_ids else candidate.number)
        numbers = (str(rank), f"{passage.score:.4f}", f"{passage.margin:+.2f}")
        # Cut in the cell, not by the column, so that a narrow terminal leaves the numbers whole.
        text = Text(printable(candidate.text), no_wrap=True, overflow="ellipsis")
        table.add_row(*numbers, Text(printable(name)), text)
    return table
