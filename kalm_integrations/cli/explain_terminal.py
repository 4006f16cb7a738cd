"""What `kalm explain` prints in a terminal, which may have no colours and 80 columns."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from kalm_integrations.cli.explanation import ENCODINGS, OUTSIDE, Explained, Explanation, level_of
from kalm_integrations.cli.terminal import make_table, printable
from kalm_integrations.core.types import Span

STYLES = ("dim", "", "bold", "black on yellow", "bold black on yellow")
"""Of sentences, by the level of their score; both kinds of terminals, light and dark, show them."""


def overview(explanation: Explanation) -> Table:
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
    return Text(printable(text), no_wrap=True, overflow="ellipsis")


def details(one: Explained) -> Table:
    """Return a passage, a sentence a line, each behind its score."""
    passage = one.passage
    facts = f"score {passage.score:.4f}, margin {passage.margin:+.2f}, came as {one.place} ({one.move})"
    window = f"; {one.window}" if one.window else ""
    table = make_table()
    table.expand = True  # or the title would be as narrow as the sentences
    table.show_header = False
    table.title_justify = "left"
    table.title = Text(printable(f"{one.rank}. {one.name}: {facts}; encoding {ENCODINGS[one.status]}{window}"), style="bold")
    table.add_column("score", justify="right", no_wrap=True, vertical="top")
    table.add_column("sentence", overflow="fold", ratio=1)
    for text, span in one.pieces():
        if isinstance(span, Span):
            table.add_row(f"{span.score:.4f}", Text(printable(text), style=STYLES[level_of(span.score)]))
        elif text.strip():
            # Of a book, nobody wants to scroll through all that is not meant.
            shown = f"{len(text):,} characters" if span == OUTSIDE else printable(text.strip())
            table.add_row(span, Text(shown, style="dim"))
    return table
