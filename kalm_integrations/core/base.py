"""What every reranker offers, whatever ranks inside: adapters ask for this, and the fake is one too. Without torch."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kalm_integrations import tracing
from kalm_integrations.core.fallback import OnError, check_on_error, check_timeout, keep_order, note_answer
from kalm_integrations.core.ranking import RankRules, check_count, check_first_stages
from kalm_integrations.core.text import check_instruction_length
from kalm_integrations.core.types import (
    AnyPassage,
    FusionMethod,
    Metadata,
    Passage,
    Ranking,
    Reading,
    RuntimeStats,
    Span,
    checked_list,
    plain,
)
from kalm_integrations.errors import SettingsError


@dataclass(frozen=True)
class RankRequest:
    """The arguments of `Reranker.rank_many`, checked; the lists are as long as the queries."""

    queries: Sequence[str]
    lists: Sequence[list[AnyPassage] | Reading]
    """Each query's passages."""
    rules: RankRules
    instruction: str | None
    first_stages: Sequence[list[float] | None]
    """The first stage's scores of each query's passages."""
    timeout: float | None = None
    """Seconds in which the answer must come."""
    spans: int | None = None
    """How many of the best passages come back with their spans."""


class Reranker(ABC):
    """Ranks passages for queries; `KalmReranker` and `testing.FakeReranker` are rerankers."""

    @property
    def model_name(self) -> str:
        """What to call the model in traces and answers."""
        return type(self).__name__

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """What made an encoding: checkpoint and encoder settings."""

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """All that its encodings may carry: the fingerprint, and behind it that of passages in windows, if it makes such."""
        return (self.fingerprint,)

    @property
    @abstractmethod
    def stats(self) -> RuntimeStats:
        """A snapshot of the counters."""

    @abstractmethod
    def warm_up(self, *, encoder: bool = True, decoder: bool = True) -> None:
        """Load weights now: the encoder's instead of at the first miss, the decoder's instead of at the first score."""

    @abstractmethod
    def encode_to_metadata(self, texts: Iterable[str], show_progress: bool = False) -> list[Metadata]:
        """Encode passages and return the metadata to store: for each, in order, `kalm_encoding` and `kalm_fp`."""

    @abstractmethod
    def read(self, passages: Iterable[AnyPassage]) -> Reading:
        """Return the status of each passage's encoding; nothing is encoded, and nothing is counted in `stats` yet."""

    @abstractmethod
    def answer(self, request: RankRequest) -> list[Ranking]:
        """Return the ranking of each query's passages.

        Raises:
            DeadlineExceededError: the request's time-out has passed.
        """

    async def aanswer(self, request: RankRequest) -> list[Ranking]:
        """Do what `answer` does, on another thread unless a subclass knows better."""
        return await asyncio.to_thread(self.answer, request)

    def get_ready(self, timeout: float | None = None) -> None:
        """Have at hand what `read` needs; where that is elsewhere, it is asked for, once.

        Raises:
            DeadlineExceededError: it did not come in `timeout` seconds.
        """
        del timeout

    async def aread(self, passages: Iterable[AnyPassage]) -> Reading:
        """Do what `read` does, off the event loop."""
        return await asyncio.to_thread(self.read, passages)

    async def aencode_to_metadata(self, texts: Iterable[str], show_progress: bool = False) -> list[Metadata]:
        """Do what `encode_to_metadata` does, on another thread unless a subclass knows better."""
        return await asyncio.to_thread(self.encode_to_metadata, texts, show_progress)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until encodings that were handed to a store in the background are written, and return whether they are."""
        del timeout
        return True

    def find_unencoded(self, passages: Iterable[Passage]) -> list[int]:
        """Return the indices of the passages whose encoding is missing, corrupt, or of another text or model."""
        return self.read(passages).not_stored

    def score(self, query: str, passages: Iterable[AnyPassage] | Reading, instruction: str | None = None) -> list[float]:
        """Return P(yes) for each passage, in order.

        Args:
            query: the query.
            passages: texts, encodings, or `Passage`s (a text with the metadata string of its encoding, which is used if it
                is valid and otherwise made anew, and counted in `stats`); or their reading.
            instruction: replaces the reranker's instruction for this call.

        Raises:
            SettingsError: an argument has the wrong type.
            StaleEncodingError: an `EncodedPassage` was made by another checkpoint or encoder setting.
            NonFiniteScoreError: the model produced NaN or infinite logits.
        """
        return _in_order(self.rank(query, passages, instruction=instruction))

    async def ascore(
        self, query: str, passages: Iterable[AnyPassage] | Reading, instruction: str | None = None
    ) -> list[float]:
        """Do what `score` does; no thread waits for it, and a coroutine that is cancelled takes its request back."""
        return _in_order(await self.arank(query, passages, instruction=instruction))

    def rank(
        self,
        query: str,
        passages: Iterable[AnyPassage] | Reading,
        top_k: int | None = None,
        score_threshold: float | None = None,
        instruction: str | None = None,
        *,
        first_stage_scores: Sequence[float] | None = None,
        fusion: FusionMethod | None = None,
        fusion_weight: float | None = None,
        spans: int | None = None,
        timeout: float | None = None,
        on_error: OnError = "raise",
    ) -> Ranking:
        """Return passages, best first; ties keep the order of `passages`.

        Args:
            query: the query.
            passages: see `score`.
            top_k: how many to return at most; None returns all.
            score_threshold: passages that score less are left out, before `top_k` is applied.
            instruction: replaces the reranker's instruction for this call.
            first_stage_scores: what the retriever gave the passages, higher is better; for `fusion`.
            fusion: order by both stages instead of by the reranker alone: "z_score" adds the scores, each scaled over the
                passages of this call; "reciprocal_rank" adds the reciprocal ranks, and without `first_stage_scores` takes
                the order of `passages` as the first stage's. `score` stays P(yes), and so does what `score_threshold` cuts
                by; `fused` has the value that decides.
            fusion_weight: the reranker's share in it, from 0 to 1; None takes the method's default.
            spans: how many of the best passages come back with the scores of their sentences, as `highlight` gives them; each
                sentence costs about what a passage without prefix states does. None: no passage does.
            timeout: seconds in which the answer must come; None waits as long as it takes. Weights that are still to be
                loaded take their part: see `warm_up`.
            on_error: "keep_order" returns the passages in the order in which they came, unscored and with
                `ranking.reranked` False, if the reranker is late or fails; mistakes in the arguments are raised all the same.

        Returns:
            A list of `RankedPassage`s that also says what was learned on the way: `counts`, and in `made` the metadata to
            store of what had to be encoded.

        Raises:
            SettingsError: an argument has the wrong type or breaks a rule: `top_k` is not positive, `fusion` lacks the
                scores that it needs, one of them is not finite, or `spans` are asked for of an `EncodedPassage`, which has
                no text.
            StaleEncodingError: an `EncodedPassage` was made by another checkpoint or encoder setting.
            NonFiniteScoreError: the model produced NaN or infinite logits.
            EngineError: the answer did not come in time, too much waits already, or torch failed; see its subclasses.
        """
        rules = RankRules(top_k, score_threshold, fusion, fusion_weight)
        check_on_error(on_error)
        request = _one(query, passages, rules, instruction, first_stage_scores, timeout, spans)
        with tracing.ranking(self, request) as span:
            try:
                rankings = self.answer(request)
            except Exception as error:
                kept = keep_order(error, on_error, request.lists[0], rules.top_k)
                span.fail(error)
                return kept
            span.answer(rankings)
        note_answer()
        return rankings[0]

    async def arank(
        self,
        query: str,
        passages: Iterable[AnyPassage] | Reading,
        top_k: int | None = None,
        score_threshold: float | None = None,
        instruction: str | None = None,
        *,
        first_stage_scores: Sequence[float] | None = None,
        fusion: FusionMethod | None = None,
        fusion_weight: float | None = None,
        spans: int | None = None,
        timeout: float | None = None,
        on_error: OnError = "raise",
    ) -> Ranking:
        """Do what `rank` does; no thread waits for it, and a coroutine that is cancelled takes its request back.

        What of a request is not being computed yet is not computed any more then.
        """
        rules = RankRules(top_k, score_threshold, fusion, fusion_weight)
        check_on_error(on_error)
        request = _one(query, passages, rules, instruction, first_stage_scores, timeout, spans)
        with tracing.ranking(self, request) as span:
            try:
                rankings = await self.aanswer(request)
            except Exception as error:
                kept = keep_order(error, on_error, request.lists[0], rules.top_k)
                span.fail(error)
                return kept
            span.answer(rankings)
        note_answer()
        return rankings[0]

    def highlight(self, query: str, passage: str | Passage, instruction: str | None = None) -> list[Span]:
        """Return which sentences of a passage speak for it, best first.

        A sentence's score is P(yes) of the passage with the encoder's states of this sentence alone: the encoder has read all
        of the passage, the decoder reads the sentence. Text without sentences (code, tables, Thai) is cut into windows.

        Args:
            query: the query.
            passage: a text, or a text with its stored encoding.
            instruction: replaces the reranker's instruction for this call.

        Raises:
            SettingsError: an argument has the wrong type.
            NonFiniteScoreError: the model produced NaN or infinite logits.
        """
        return _spans(self.rank(query, [passage], instruction=instruction, spans=1))

    async def ahighlight(self, query: str, passage: str | Passage, instruction: str | None = None) -> list[Span]:
        """Do what `highlight` does; no thread waits."""
        return _spans(await self.arank(query, [passage], instruction=instruction, spans=1))

    def rank_many(
        self,
        queries: Iterable[str],
        passages: Iterable[Iterable[AnyPassage] | Reading],
        top_k: int | None = None,
        score_threshold: float | None = None,
        instruction: str | None = None,
        *,
        first_stage_scores: Sequence[Sequence[float]] | None = None,
        fusion: FusionMethod | None = None,
        fusion_weight: float | None = None,
        spans: int | None = None,
    ) -> list[Ranking]:
        """Return the ranking of each query's passages: what `rank` returns for each, in less time.

        A passage that several queries share is read or encoded once, and its prefix states are computed once. For evaluation
        and offline jobs. A ranking keeps the encodings that were made for it: drop what is done with. The arguments are those
        of `rank`, with a list of passages (or their reading) and of scores for each query.

        Raises:
            SettingsError: there are not as many lists as queries; and what `rank` raises.
        """
        rules = RankRules(top_k, score_threshold, fusion, fusion_weight)
        request = _request(queries, passages, rules, instruction, first_stage_scores, None, spans)
        with tracing.ranking(self, request, "kalm.rank_many") as span:
            rankings = self.answer(request)
            span.answer(rankings)
        return rankings


def _one(
    query: object,
    passages: object,
    rules: RankRules,
    instruction: object,
    first_stage_scores: Sequence[float] | None,
    timeout: object,
    spans: object,
) -> RankRequest:
    """Check the arguments of `rank`."""
    first_stages = None if first_stage_scores is None else [first_stage_scores]
    return _request([query], [passages], rules, instruction, first_stages, timeout, spans)


def _request(
    queries: Iterable[Any],
    passages: Iterable[Any],
    rules: RankRules,
    instruction: object,
    first_stage_scores: Sequence[Sequence[float]] | None,
    timeout: object,
    spans: object,
) -> RankRequest:
    """Check the arguments of `rank_many`."""
    queries = [plain(query) for query in checked_list(queries, "queries")]
    lists = [checked_passages(given) for given in checked_list(passages, "passages")]
    if len(queries) != len(lists):
        msg = f"rank_many needs a list of passages for each query, but got {len(queries)} queries and {len(lists)} lists"
        raise SettingsError(msg)
    for query in queries:
        if not isinstance(query, str):
            msg = f"query must be a string, but got {type(query).__name__}"
            raise SettingsError(msg)
    first_stages = check_first_stages(first_stage_scores, lists, rules.fusion)
    n_spans = check_count(spans, "spans")
    return RankRequest(queries, lists, rules, check_instruction(instruction), first_stages, check_timeout(timeout), n_spans)


def _in_order(ranking: Ranking) -> list[float]:
    """Return the scores of a ranking in the order of the passages that were given."""
    return [passage.score for passage in sorted(ranking, key=lambda passage: passage.index)]


def _spans(ranking: Ranking) -> list[Span]:
    """Return the spans of a ranking's only passage."""
    return list(ranking[0].spans or ())


def is_reranker(value: object) -> bool:
    """Return whether a value can stand in for a reranker, of whatever class.

    This reads no property: for the fingerprint a whole checkpoint may have to be hashed.
    """
    return all(hasattr(type(value), name) for name in ("rank", "read", "encode_to_metadata"))


def checked_passages(passages: Any) -> list[AnyPassage] | Reading:
    """Return passages as a list, or their reading.

    Raises:
        SettingsError: they are neither.
    """
    return passages if isinstance(passages, Reading) else checked_list(passages, "passages")


def check_instruction(instruction: object) -> str | None:
    """Return an instruction as a plain str.

    Raises:
        SettingsError: it is no string, or too long.
    """
    text = plain(instruction)
    if text is None:
        return None
    if not isinstance(text, str):
        msg = f"instruction must be a string or None, but got {type(instruction).__name__}"
        raise SettingsError(msg)
    return check_instruction_length(text)
