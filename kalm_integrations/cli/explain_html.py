"""What `kalm explain --html` writes: one page without scripts, which loads nothing."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Sequence

from kalm_integrations.cli.explanation import ENCODINGS, LEVELS, OUTSIDE, Explained, Explanation, level_of
from kalm_integrations.core.text import without_surrogates
from kalm_integrations.core.types import Span

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1c1b19; --quiet: #5c5953; --line: #d9d5cc; --link: #0b57a4;
  --s0: transparent; --s1: #fdf3d8; --s2: #fbe3a6; --s3: #f8cf6a; --s4: #f2b632; }
@media (prefers-color-scheme: dark) { :root { --page: #171613; --text: #f4f1ea; --quiet: #b3aea3; --line: #423f38;
  --link: #8ec2ff; --s0: transparent; --s1: #2b2615; --s2: #463a14; --s3: #5e4b12; --s4: #7d620c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 88rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; line-height: 1.3; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; margin: 0; }
a { color: var(--link); } .quiet { color: var(--quiet); font-size: .875rem; }
.sides { display: grid; gap: 1rem 2rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
ol { margin: .5rem 0 0; padding-left: 2rem; } li { margin-bottom: .5rem; }
article { border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; }
.passage { white-space: pre-wrap; line-height: 1.75; margin: .75rem 0 0; }
mark { color: inherit; padding: .1rem .15rem; border-radius: .2rem; unicode-bidi: isolate;
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
mark b { font-size: .75rem; font-variant-numeric: tabular-nums; margin-inline-end: .25rem; }
.best { text-decoration: underline; text-decoration-thickness: 2px; text-underline-offset: .25rem; }
.best b { display: inline-block; }
.s0 { background: var(--s0); } .s1 { background: var(--s1); } .s2 { background: var(--s2); } .s3 { background: var(--s3); }
.s4 { background: var(--s4); } .unread { color: var(--quiet); font-style: italic; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .5rem 1rem; }
@media print { article { break-inside: avoid; } mark { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{query} – reranked</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>Why passages rank as they do: <q><bdi>{query}</bdi></q></h1>
<p>{facts}</p>
</header>
<main>
<section aria-labelledby="order">
<h2 id="order">Before and after</h2>
<div class="sides">
<section aria-labelledby="before"><h3 id="before">As they came</h3><ol>
{before}
</ol></section>
<section aria-labelledby="after"><h3 id="after">Ranked</h3><ol>
{after}
</ol></section>
</div>
</section>
<section aria-labelledby="passages">
<h2 id="passages">Passages</h2>
<p class="quiet">The number before a sentence is its score: P(yes) of the passage if it said no more than this sentence. Each
passage's best sentence is underlined.</p>
<ul class="legend" aria-label="Shades of scores">{legend}</ul>
<div class="sides">
{passages}
</div>
</section>
</main>
</body>
</html>
"""

_BEGINNING = 120
"""Characters of a passage in the lists."""


def to_html(explanation: Explanation) -> str:
    """Return the page; whatever a passage holds is shown as text."""
    detailed = {one.rank for one in explanation.after}
    n_passages, n_made = len(explanation.passages), explanation.n_made
    facts = (
        f"{_escape(explanation.model)} ranked {n_passages:,} {'passage' if n_passages == 1 else 'passages'}; "
        f"{n_passages - n_made:,} encodings were found, {n_made:,} made now."
    )
    return _PAGE.format(
        style=_STYLE,
        query=_escape(explanation.query),
        facts=facts,
        before="\n".join(_item(one, f"ranked {one.rank}", detailed) for one in explanation.before),
        after="\n".join(_item(one, f"came as {one.place}, {one.move}", detailed) for one in explanation.after),
        legend=_legend(),
        passages="\n".join(map(_article, explanation.after)),
    )


def _item(one: Explained, place: str, detailed: set[int]) -> str:
    """Return a passage's line in a list, with a link to where it is shown whole."""
    name = f"<bdi>{_escape(one.name)}</bdi>"
    if one.rank in detailed:
        name = f'<a href="#rank-{one.rank}">{name}</a>'
    text = " ".join(one.text.split())
    beginning = text if len(text) <= _BEGINNING else f"{text[:_BEGINNING]}…"
    facts = f"score {one.passage.score:.4f}, {place}"
    return f'<li>{name} <span class="quiet">{facts}</span><br><span dir="auto">{_escape(beginning)}</span></li>'


def _article(one: Explained) -> str:
    """Return a passage with its sentences shaded."""
    passage = one.passage
    best = max((span.score for span in one.spans), default=None)
    pieces = []
    for text, span in one.pieces():
        if isinstance(span, Span):
            kind, title = f"s{level_of(span.score)}", f"score {span.score:.4f}"
            if span.score == best:
                kind, title = f"{kind} best", f"{title}, the passage's best"
            pieces.append(f'<mark class="{kind}" title="{title}"><b>{span.score:.2f}</b>{_escape(text)}</mark>')
        elif text.strip():
            title = "not in the window that scores best" if span == OUTSIDE else "behind what the model reads of a passage"
            pieces.append(f'<span class="unread" title="{title}">[{span}:] {_escape(text)}</span>')
        else:
            pieces.append(_escape(text))
    facts = f"Score {passage.score:.4f}, margin {passage.margin:+.2f}; came as {one.place}, {one.move}"
    window = f"<br>{one.window.capitalize()}." if one.window else ""
    return (
        f'<article id="rank-{one.rank}" aria-labelledby="name-{one.rank}">'
        f'<h3 id="name-{one.rank}">{one.rank}. <bdi>{_escape(one.name)}</bdi></h3>'
        f'<div class="quiet">{facts}.<br>Encoding: {ENCODINGS[one.status]}.{window}</div>'
        f'<p class="passage" dir="auto">{"".join(pieces)}</p></article>'
    )


def _legend() -> str:
    starts: Sequence[float] = (0, *LEVELS)
    ends = (*LEVELS, 1)
    shades = enumerate(zip(starts, ends, strict=True))
    return "".join(f'<li><mark class="s{level}">{start:.1f} to {end:.1f}</mark></li>' for level, (start, end) in shades)


def _escape(text: str) -> str:
    """Return text for HTML, which has no surrogates and no control characters."""
    safe = (
        "\ufffd" if unicodedata.category(character) == "Cc" and character not in "\n\t" else character
        for character in without_surrogates(text.replace("\r\n", "\n"))
    )
    return html.escape("".join(safe))
