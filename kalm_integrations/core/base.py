"""What every reranker offers, whatever ranks inside: adapters ask for this, and the fake is one too. Without torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kalm_integrations.core.ranking import RankRules, check_first_stages
from kalm_integrations.core.types import (
    AnyPassage,
    FusionMethod,
    Metadata,
    Passage,
    Ranking,
    Reading,
    RuntimeStats,
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


class Reranker(ABC):
    """Ranks passages for queries; `KalmReranker` and `testing.FakeReranker` are rerankers."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """What made an encoding: checkpoint and encoder settings."""

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
        """Return the ranking of each query's passages."""

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
        ranking = self.rank(query, passages, instruction=instruction)
        return [passage.score for passage in sorted(ranking, key=lambda passage: passage.index)]

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

        Returns:
            A list of `RankedPassage`s that also says what was learned on the way: `counts`, and in `made` the metadata to
            store of what had to be encoded.

        Raises:
            SettingsError: an argument has the wrong type or breaks a rule: `top_k` is not positive, `fusion` lacks the
                scores that it needs, or one of them is not finite.
            StaleEncodingError: an `EncodedPassage` was made by another checkpoint or encoder setting.
            NonFiniteScoreError: the model produced NaN or infinite logits.
        """
        rules = RankRules(top_k, score_threshold, fusion, fusion_weight)
        first_stages = None if first_stage_scores is None else [first_stage_scores]
        return self._rank([query], [passages], rules, instruction, first_stages)[0]

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
    ) -> list[Ranking]:
        """Return the ranking of each query's passages: what `rank` returns for each, in less time.

        A passage that several queries share is read or encoded once, and its prefix states are computed once. For evaluation
        and offline jobs. A ranking keeps the encodings that were made for it: drop what is done with. The arguments are those
        of `rank`, with a list of passages (or their reading) and of scores for each query.

        Raises:
            SettingsError: there are not as many lists as queries; and what `rank` raises.
        """
        rules = RankRules(top_k, score_threshold, fusion, fusion_weight)
        return self._rank(queries, passages, rules, instruction, first_stage_scores)

    def _rank(
        self,
        queries: Iterable[Any],
        passages: Iterable[Any],
        rules: RankRules,
        instruction: object,
        first_stage_scores: Sequence[Sequence[float]] | None,
    ) -> list[Ranking]:
        """Check the arguments, then rank."""
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
        return self.answer(RankRequest(queries, lists, rules, check_instruction(instruction), first_stages))


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
        SettingsError: it is no string.
    """
    text = plain(instruction)
    if text is not None and not isinstance(text, str):
        msg = f"instruction must be a string or None, but got {type(instruction).__name__}"
        raise SettingsError(msg)
    return text
