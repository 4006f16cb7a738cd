"""Which sentences of a passage speak for it: the decoder is asked about each one's states alone.

The encoder has read a sentence within its passage, so its states know what "it" and "there" mean. Nothing is encoded for this
and nothing else is stored: where the tokens lie in the text is found by tokenising it again. Figures are in docs/spans.md.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from kalm_integrations.core.flows import Flow
from kalm_integrations.core.passages.encoding import EncodedPassage
from kalm_integrations.core.passages.prefixes import Candidate
from kalm_integrations.core.runtime import Runtime
from kalm_integrations.core.scoring import Scorer, candidates_of
from kalm_integrations.core.sentences import divide
from kalm_integrations.core.text import Range, ranges_in, without_surrogates
from kalm_integrations.core.types import Span
from kalm_integrations.core.windowing import passage_offsets


@dataclass(frozen=True)
class Asked:
    """A passage whose sentences are to be scored."""

    query: int
    """Index of the query."""
    text: str
    encoding: EncodedPassage
    window: int | None = None
    """Index of the window whose sentences are meant, of a passage in windows."""


class Highlighter:
    """Scores the sentences of passages."""

    def __init__(
        self,
        runtime: Runtime,
        scorer: Scorer,
        to_scores: Callable[[Sequence[float]], list[float]],
        *,
        allow_special_tokens: bool,
    ) -> None:
        """Take what scores candidates, and what makes scores of margins."""
        self._runtime = runtime
        self._scorer = scorer
        self._to_scores = to_scores
        self._allow_special_tokens = allow_special_tokens

    def highlight(
        self, queries: Sequence[str], asked: Sequence[Asked], instruction: str | None
    ) -> Flow[list[tuple[Span, ...]]]:
        """Return the spans of each passage, best first; all sentences of all passages are scored together.

        Args:
            queries: the queries.
            asked: passages, each for one of the queries.
            instruction: of the call; None takes the reranker's.
        """
        # A text may come several times.
        sentences = {one: self._sentences(one) for one in dict.fromkeys(asked)}
        candidates = [_part(one, *states) for one, found in sentences.items() for _, states in found]
        owners = [one.query for one, found in sentences.items() for _ in found]
        pairs = [(query, index) for index, query in enumerate(owners)]
        margins = iter((yield from self._scorer.margins_of(queries, candidates, pairs, instruction, keeps_states=False)))
        spans = {}
        for one, found in sentences.items():
            own = list(islice(margins, len(found)))
            rows = zip(own, self._to_scores(own), ranges_in(one.text, [place for place, _ in found]), strict=True)
            best_first = sorted(rows, key=lambda row: -row[0])
            spans[one] = tuple(Span(start, end, score) for _, score, (start, end) in best_first)
        return [spans[one] for one in asked]

    def _sentences(self, asked: Asked) -> list[tuple[Range, Range]]:
        """Return the sentences of a passage: where each lies in the text without surrogates, and which states it has."""
        tokenizer = self._runtime.tokenizer(allow_special_tokens=self._allow_special_tokens)
        text, n_tokens, begin = without_surrogates(asked.text), asked.encoding.n_tokens, 0
        if asked.window is not None and asked.encoding.windows is not None:
            window = asked.encoding.windows[asked.window]
            begin, end = window.place_in(text)
            text, n_tokens = text[begin:end], window.n_tokens
        offsets = passage_offsets(tokenizer, text, n_tokens)
        starts, ends = ([offset[side] for offset in offsets] for side in (0, 1))
        ratio = asked.encoding.compression_ratio
        found = []
        for start, end in divide(text, offsets):
            first, stop = bisect_right(ends, start), bisect_left(starts, end)
            if first < stop:
                found.append(((begin + start, begin + end), (first // ratio, -(-stop // ratio))))
        return found


def _part(asked: Asked, first: int, stop: int) -> Candidate:
    """Return some states of what is asked about as a passage of their own."""
    whole = candidates_of(asked.encoding)[asked.window or 0]
    return Candidate(whole.states[first:stop], (*whole.key, first, stop))
