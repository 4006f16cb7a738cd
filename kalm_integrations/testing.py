"""A reranker without a model, for the tests of applications that rerank."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import replace

from kalm_integrations.core.fusion import check_first_stage, check_first_stages, check_fusion, fuse
from kalm_integrations.core.ranking import best_first, check_cut
from kalm_integrations.core.types import (
    ENCODING_KEY,
    FINGERPRINT_KEY,
    AnyPassage,
    FusionMethod,
    Passage,
    RankedPassage,
    RuntimeStats,
)
from kalm_integrations.errors import SettingsError


class FakeReranker:
    """Scores by the share of the query's words that a passage has, and counts encodes as a real reranker does.

    Deterministic and without torch. Its encodings are strings that only a fake of the same `name` accepts, so that a test can
    play through stale and corrupt metadata.
    """

    def __init__(self, name: str = "fake") -> None:
        """Make a fake; another `name` stands for another checkpoint."""
        self.fingerprint = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
        self.stats = RuntimeStats()

    def warm_up(self, *, encoder: bool = True, decoder: bool = True) -> None:
        """Do nothing: there are no weights."""

    def encode_to_metadata(self, texts: Sequence[str], show_progress: bool = False) -> list[dict[str, str]]:
        """Return metadata with a fake encoding for each text; duplicates are counted once."""
        del show_progress
        n_encoded = self.stats.passages_encoded + len(set(texts))
        self.stats = replace(self.stats, passages_encoded=n_encoded)
        return [{ENCODING_KEY: self._encoding(text), FINGERPRINT_KEY: self.fingerprint} for text in texts]

    def find_unencoded(self, passages: Sequence[Passage]) -> list[int]:
        """Return the indices of the passages whose encoding this fake has not made for this text."""
        return [i for i, passage in enumerate(passages) if passage.encoding != self._encoding(passage.text)]

    def score(self, query: str, passages: Sequence[AnyPassage], instruction: str | None = None) -> list[float]:
        """Return a score for each passage, in order; those without a valid encoding count as encoded."""
        return [_sigmoid(margin) for margin in self._margins(query, passages, instruction)]

    def rank(
        self,
        query: str,
        passages: Sequence[AnyPassage],
        top_k: int | None = None,
        score_threshold: float | None = None,
        instruction: str | None = None,
        *,
        first_stage_scores: Sequence[float] | None = None,
        fusion: FusionMethod | None = None,
        fusion_weight: float | None = None,
    ) -> list[RankedPassage]:
        """Return passages, best first; ties keep their order. Fusion works as in `KalmReranker.rank`."""
        check_cut(top_k, score_threshold)
        check_fusion(fusion, fusion_weight)
        first_stage = check_first_stage(first_stage_scores, len(passages), fusion)
        margins = self._margins(query, passages, instruction)
        fused = None if fusion is None else fuse(margins, first_stage, fusion, fusion_weight)
        return best_first([_sigmoid(margin) for margin in margins], margins, top_k, score_threshold, fused)

    def rank_many(
        self,
        queries: Sequence[str],
        passages: Sequence[Sequence[AnyPassage]],
        top_k: int | None = None,
        score_threshold: float | None = None,
        instruction: str | None = None,
        *,
        first_stage_scores: Sequence[Sequence[float]] | None = None,
        fusion: FusionMethod | None = None,
        fusion_weight: float | None = None,
    ) -> list[list[RankedPassage]]:
        """Return the ranking of each query's passages."""
        check_fusion(fusion, fusion_weight)
        first_stages = check_first_stages(first_stage_scores, passages, fusion)
        return [
            self.rank(
                query,
                candidates,
                top_k,
                score_threshold,
                instruction,
                first_stage_scores=first_stage,
                fusion=fusion,
                fusion_weight=fusion_weight,
            )
            for query, candidates, first_stage in zip(queries, passages, first_stages, strict=True)
        ]

    def _margins(self, query: str, passages: Sequence[AnyPassage], instruction: str | None) -> list[float]:
        del instruction
        given = [self._passage(passage) for passage in passages]
        missing = {given[index].text for index in self.find_unencoded(given)}
        unique = {passage.text for passage in given}
        self.stats = replace(
            self.stats,
            passages_encoded=self.stats.passages_encoded + len(missing),
            cache_misses=self.stats.cache_misses + len(missing),
            cache_hits=self.stats.cache_hits + len(unique - missing),
            metadata_hits=self.stats.metadata_hits + len(unique - missing),
            passages_scored=self.stats.passages_scored + len(unique),
        )
        words = set(_words(query))
        shares = [len(words & set(_words(passage.text))) / max(len(words), 1) for passage in given]
        return [8 * share - 4 for share in shares]

    def _encoding(self, text: str) -> str:
        return f"kalm1.{self.fingerprint}.{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"

    @staticmethod
    def _passage(passage: AnyPassage) -> Passage:
        if isinstance(passage, str):
            return Passage(passage)
        if isinstance(passage, Passage):
            return passage
        msg = f"a fake scores str and Passage, but got {type(passage).__name__}; it cannot read states"
        raise SettingsError(msg)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _sigmoid(margin: float) -> float:
    return 1 / (1 + math.exp(-margin))
