"""Which sentences of a document's own text were judged how, and the text without those that say nothing about the query."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from typing import Any

from kalm_integrations.core.text import Range, without_blanks
from kalm_integrations.core.types import RankedPassage, Span, as_number, shown
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting.documents import KEPT_SPANS_KEY, RELEVANT_SPANS_KEY, RELEVANT_WINDOW_KEY

DEFAULT_PRUNE_THRESHOLD = 0.001
"""Part of the best sentence's odds that another must have to be kept, where none is given. By docs/spans.md."""

_LEAST_DOUBT = 2.0**-24
"""What float32 leaves between 1 and the next score."""


def check_prune_threshold(threshold: object) -> float | None:
    """Return a threshold for sentences as a float; None takes the default.

    Raises:
        SettingsError: it is no number from 0 to 1.
    """
    if threshold is None:
        return None
    checked = as_number(threshold)
    if not 0 <= checked <= 1:
        msg = f"prune_threshold must be a number from 0 (keep all) to 1, or None for the default, but got {shown(threshold)}"
        raise SettingsError(msg)
    return checked


def check_pruning(prune: bool, threshold: float | None) -> None:
    """Check that a threshold has an effect.

    Raises:
        SettingsError: it is given, and nothing is pruned.
    """
    if threshold is not None and not prune:
        msg = f"prune_threshold={threshold} is for prune, but prune is False; set prune=True too"
        raise SettingsError(msg)


@dataclass(frozen=True)
class Excerpt:
    """What spans make of a returned document."""

    metadata: dict[str, Any] = field(default_factory=dict)
    """To add: the spans that were asked for, and their window."""
    text: str | None = None
    """The text that is left; None: it stays as it is."""


def excerpt(text: str, place: RankedPassage, *, highlight: bool, threshold: float | None) -> Excerpt:
    """Return what the spans of a ranked document say about its own text; nothing if it was not reranked.

    Args:
        text: the document's own, as it came. What was judged may have had metadata around it.
        place: of the document, with its spans.
        highlight: put the spans into the metadata, and the window that they are of, if there are several.
        threshold: cut the text to the sentences that it lets stay, see `kept_ranges`; None leaves it whole.
    """
    if not place.is_scored:
        return Excerpt()
    judged = place.text or ""
    spans = own_spans(text, judged, place.spans or ())
    windows = [] if place.window is None else own_spans(text, judged, [Span(*place.window, place.score)])
    # There is none if it lies in the metadata around the text.
    window = next(((window.start, window.end) for window in windows), None)
    metadata: dict[str, Any] = {}
    if highlight:
        metadata[RELEVANT_SPANS_KEY] = [span.to_dict() for span in spans]
        if window is not None:
            metadata[RELEVANT_WINDOW_KEY] = _to_dict(window)
    if threshold is None:
        return Excerpt(metadata)
    kept = kept_ranges(text, spans, threshold, window)
    metadata[KEPT_SPANS_KEY] = [_to_dict(part) for part in kept]
    pruned = cut_out(text, kept)
    return Excerpt(metadata, None if pruned == text else pruned)


def own_spans(text: str, judged: str, spans: Iterable[Span]) -> list[Span]:
    """Return where spans lie in a document's own text: those that reach beyond it are clipped, those outside left out.

    Args:
        text: the document's own.
        judged: what the spans are of. If it has the text several times, the last one counts: metadata stand in front.
        spans: in any order, which is kept.

    Returns:
        No spans if the text is blank, or does not stand in what was judged.
    """
    bare = text.strip()
    place = judged.rfind(bare) if bare else -1
    if place < 0:
        return []
    # A template may have taken the blanks around the text away.
    shift = place - (len(text) - len(text.lstrip()))
    found = []
    for span in spans:
        start, end = (min(max(at - shift, 0), len(text)) for at in (span.start, span.end))
        start, end = without_blanks(text, start, end)
        if start < end:
            found.append(replace(span, start=start, end=end))
    return found


def odds(score: float) -> float:
    """Return how much more likely yes is than no, by P(yes)."""
    return score / max(1 - score, _LEAST_DOUBT)


def kept_ranges(text: str, spans: Sequence[Span], threshold: float, window: Range | None = None) -> list[Range]:
    """Return which parts of a text are left if sentences are taken out whose odds are far below the best one's.

    The best sentence is kept in any case. Neighbours make one part with all that stands between them. What is behind the last
    sentence was not read, and is kept too. Of a text that was read in windows only the best window is left.

    Args:
        text: the text.
        spans: its sentences, of which none reach into each other, in any order; none keeps all.
        threshold: part of the best sentence's odds that a sentence must have.
        window: in which all spans lie; None where the text was read in one piece.

    Returns:
        In order; they do not touch each other. None of a text without characters.
    """
    begin, stop = (0, len(text)) if window is None else window
    if not spans:
        return [(begin, stop)] if begin < stop else []
    least = threshold * max(odds(span.score) for span in spans)
    in_order = sorted(spans, key=lambda span: span.start)
    ranges: list[Range] = []
    for is_kept, group in groupby(in_order, key=lambda span: odds(span.score) >= least):
        neighbours = list(group)
        if is_kept:
            ranges.append((neighbours[0].start, neighbours[-1].end))
    if ranges[0][0] == in_order[0].start:
        ranges[0] = (begin, ranges[0][1])
    end = in_order[-1].end
    if ranges[-1][1] == end:
        ranges[-1] = (ranges[-1][0], stop)
    elif unread := text[end:stop].lstrip():
        ranges.append((stop - len(unread), stop))
    return ranges


def _to_dict(place: Range) -> dict[str, int]:
    start, end = place
    return {"start": start, "end": end}


def cut_out(text: str, ranges: Sequence[Range]) -> str:
    """Return parts of a text; a line break stands where what lay between two of them had one, else a blank."""
    if not ranges:
        return ""
    pieces = [text[slice(*ranges[0])]]
    for (_, end), (start, stop) in pairwise(ranges):
        between = text[end:start]
        pieces += ["\n" if "\n" in between or "\r" in between else " ", text[start:stop]]
    return "".join(pieces)
