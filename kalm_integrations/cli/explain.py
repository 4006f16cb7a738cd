"""`kalm explain`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kalm_integrations.cli import options, ranking
from kalm_integrations.cli.explanation import ENCODINGS, Explained, Explanation, level_of
from kalm_integrations.cli.streams import open_output
from kalm_integrations.cli.terminal import make_table, print_json, print_table, printable
from kalm_integrations.corpora.candidates import Candidate
from kalm_integrations.corpora.text import STREAM
from kalm_integrations.errors import SettingsError

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

STYLES = ("dim", "", "bold", "black on yellow", "bold black on yellow")
"""Of sentences, by the level of their score; both kinds of terminals, light and dark, show them."""


def explain(
    query: ranking.Query,
    passages: ranking.Passages = STREAM,
    model: options.ModelOrService = "pico",
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write a page here instead, - for standard output: one file that loads nothing.", show_default="none"
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="How many of the best to explain; all are ranked.")] = 5,
    instruction: ranking.Instruction = None,
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
    """Show which sentences speak for the best passages.

    Passages are ranked as `kalm rerank` does it, and shown in the order in which they came beside the order in which they are
    ranked. Each sentence of the best ones is shown with its score: P(yes) of the passage if it said no more than this.
    """
    ranking.check_query(query)
    if html is not None and as_json:
        msg = "the output must be a page or JSON, but got both --html and --json; leave one out"
        raise SettingsError(msg)
    # The page's place is looked at before any work.
    with nullcontext() if html is None else open_output(html) as page:
        candidates = ranking.read_passages(passages, text_field, title_field, skip_bad=skip_bad)
        reranker = ranking.open_model(
            model, api_key_env, payload_store, revision=revision, device=device, dtype=dtype, compression_ratio=ratio
        )
        given = [candidate.passage for candidate in candidates]
        ranked = reranker.rank(query, given, instruction=instruction, spans=top_k)
        _, names = ranking.names_of(candidates)
        texts = [candidate.text for candidate in candidates]
        explanation = Explanation.of(query, reranker.model_name, ranked, names, texts, top_k)
        if page is not None:
            from kalm_integrations.cli.explain_html import to_html

            page.write(to_html(explanation).encode())
    if as_json:
        print_json({**_to_dict(explanation, candidates), "stats": reranker.stats.to_dict()})
        return
    if html is None and ranked:
        print_table(_overview(explanation))
        for one in explanation.after:
            print()
            print_table(_details(one))
    ranking.note_encodings(explanation.n_detailed, len(candidates), reranker.stats)


def _to_dict(explanation: Explanation, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Return an explanation for JSON."""
    results = [{**ranking.to_dict(one.passage, candidates[one.passage.index]), **_places(one)} for one in explanation.after]
    return {"query": explanation.query, "results": results, "before": [_places(one) for one in explanation.before]}


def _places(one: Explained) -> dict[str, Any]:
    """Return a passage's places and its encoding's status, for JSON."""
    return {"name": one.name, "place": one.place, "rank": one.rank, "score": one.passage.score, "encoding": one.status}


def _overview(explanation: Explanation) -> Table:
    """Return the order of passages before and after, side by side."""
    table = make_table()
    table.add_column("place", justify="right", no_wrap=True)
    for name in ("as they came", "ranked"):
        table.add_column(name, ratio=1)
    for place, (before, after) in enumerate(zip(explanation.before, explanation.after, strict=True), 1):
        came = _on_one_line(f"{before.name}  {before.text}")
        table.add_row(str(place), came, _on_one_line(f"{after.passage.score:.4f}  {after.name}  {after.text}"))
    return table


def _on_one_line(text: str) -> Text:
    from rich.text import Text

    return Text(printable(text), no_wrap=True, overflow="ellipsis")


def _details(one: Explained) -> Table:
    """Return a passage, a sentence a line, each behind its score."""
    from rich.text import Text

    passage = one.passage
    facts = f"score {passage.score:.4f}, margin {passage.margin:+.2f}, came as {one.place} ({one.move})"
    table = make_table()
    table.expand = True  # or the title would be as narrow as the sentences
    table.show_header = False
    table.title_justify = "left"
    table.title = Text(printable(f"{one.rank}. {one.name}: {facts}; encoding {ENCODINGS[one.status]}"), style="bold")
    table.add_column("score", justify="right", no_wrap=True, vertical="top")
    table.add_column("sentence", overflow="fold")
    for text, span in one.pieces():
        if span is not None:
            table.add_row(f"{span.score:.4f}", Text(printable(text), style=STYLES[level_of(span.score)]))
        elif text.strip():
            table.add_row("not read", Text(printable(text.strip()), style="dim"))
    return table
