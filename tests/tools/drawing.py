"""Small SVG drawings for the documentation: text, boxes, bars and arrows on a card that follows the reader's colours.

A picture on a page cannot know which colours the page has, so it brings its own background.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

FONTS = "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"
STYLE = """\
  <style>
    .card { fill: #ffffff; stroke: #d5dae1; }
    .ink { fill: #1f2933; }
    .quiet { fill: #52606d; }
    .box { fill: #f2f5f9; stroke: #9aa5b1; }
    .store { fill: #fff4e0; stroke: #c77d0a; }
    .line { stroke: #52606d; fill: none; stroke-width: 1.5; }
    .head { fill: #52606d; }
    .encoder { fill: #d9822b; }
    .decoder { fill: #2f7fc8; }
    .query { fill: #128a5c; }
    @media (prefers-color-scheme: dark) {
      .card { fill: #1f232b; stroke: #3c4454; }
      .ink { fill: #edf1f5; }
      .quiet { fill: #b3bdc9; }
      .box { fill: #2a303b; stroke: #6b7789; }
      .store { fill: #3a2f1c; stroke: #d9922b; }
      .line { stroke: #b3bdc9; }
      .head { fill: #b3bdc9; }
    }
  </style>"""


def picture(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """Return a whole SVG file; `title` is what a screen reader says of it."""
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="{FONTS}">',
        f"  <title>{escape(title)}</title>",
        STYLE,
        f'  <rect class="card" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
        *(f"  {part}" for part in parts),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def text(x: float, y: float, words: str, size: int = 14, kind: str = "ink", anchor: str = "start", weight: int = 400) -> str:
    """Return a line of text whose baseline starts (or, by `anchor`, is centred or ends) at a point."""
    return (
        f'<text class="{kind}" x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}">'
        f"{escape(words)}</text>"
    )


def bar(x: float, y: float, width: float, height: float, kind: str) -> str:
    """Return a filled rectangle."""
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2"/>'


def box(x: float, y: float, width: float, height: float, lines: Sequence[str], kind: str = "box") -> str:
    """Return a box with centred lines of text, the first of them in bold."""
    middle, top = x + width / 2, y + height / 2 - 8.5 * (len(lines) - 1) + 5
    words = [
        text(
            middle,
            top + 17 * place,
            line,
            14 if place == 0 else 13,
            "ink" if place == 0 else "quiet",
            "middle",
            600 - 200 * (place > 0),
        )
        for place, line in enumerate(lines)
    ]
    frame = f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>'
    return "\n  ".join([frame, *words])


def arrow(*points: tuple[float, float]) -> str:
    """Return a line through points with a head at the last, which is reached straight from above or from the side."""
    (before_x, before_y), (x, y) = points[-2:]
    across = (x > before_x) - (x < before_x)
    down = (y > before_y) - (y < before_y)
    corners = [
        (x, y),
        (x - 8 * across - 4 * down, y - 8 * down - 4 * across),
        (x - 8 * across + 4 * down, y - 8 * down + 4 * across),
    ]
    line = " ".join(f"{px:g},{py:g}" for px, py in [*points[:-1], (x - 6 * across, y - 6 * down)])
    head = " ".join(f"{px:g},{py:g}" for px, py in corners)
    return f'<polyline class="line" points="{line}"/><polygon class="head" points="{head}"/>'
