"""`kalm explain`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kalm_integrations.cli import options, ranking
from kalm_integrations.cli.explanation import ENCODINGS, Explained, Explanation, level_of
from kalm_integrations.cli.streams import open_output
from kalm_integrations.cli.terminal import make_table, print_json, print_table, printable
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
    candidates = ranking.read_passages(passages, text_field, title_field, skip_bad=skip_bad)
    reranker = ranking.open_model(
        model, api_key_env, payload_store, revision=revision, device=device, dtype=dtype, compression_ratio=ratio
    )
    given = [candidate.passage for candidate in candidates]
    ranked = reranker.rank(query, given, instruction=instruction, spans=top_k)
    _, names = ranking.names_of(candidates)
    texts = [candidate.text for candidate in candidates]
    explanation = Explanation.of(query, reranker.model_name, ranked, names, texts, top_k)
    if as_json:
        results = [
            {**ranking.to_dict(one.passage, candidates[one.passage.index]), **_places(one)} for one in explanation.after
        ]
        before = [_places(one) for one in explanation.before]
        print_json({"query": query, "results": results, "before": before, "stats": reranker.stats.to_dict()})
        return
    if html is not None:
        from kalm_integrations.cli.explain_html import to_html

        with open_output(html) as file:
            file.write(to_html(explanation).encode())
    elif ranked:
        print_table(_overview(explanation))
        for one in explanation.after:
            print()
            print_table(_details(one))
    ranking.note_encodings(explanation.n_detailed, len(candidates), reranker.stats)


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
        table.add_row(str(place), came, _on_one_line(f"{after.name}  {after.passage.score:.4f}  {after.text}"))
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
