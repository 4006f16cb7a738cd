"""Values that go in and out of a reranker, and the protocol that every reranker (and the fake) follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from kalm_integrations.core.encoding import EncodedPassage

ENCODING_KEY = "kalm_encoding"
"""Metadata key of a passage's encoding."""
FINGERPRINT_KEY = "kalm_fp"
"""Metadata key of the encoding's fingerprint, short, for stores to filter on. Readers trust the one in the encoding only."""
FUSED_SCORE_KEY = "fused_score"
"""Metadata key under which adapters return the value that a fused ranking is ordered by."""

FusionMethod: TypeAlias = Literal["z_score", "reciprocal_rank"]
"""How the reranker's and the first stage's scores are made one; see `core.fusion.fuse`."""


@dataclass(frozen=True)
class Passage:
    """A passage's text, with the metadata string of its encoding if the store had one."""

    text: str
    encoding: str | None = field(default=None, repr=False)


AnyPassage: TypeAlias = "str | EncodedPassage | Passage"
"""What can be scored: a text, an encoding, or a text with its stored encoding."""


@dataclass(frozen=True)
class RankedPassage:
    """A passage's place in a ranking."""

    index: int
    """Position in the passages that were given."""
    score: float
    """P(yes), between 0 and 1."""
    margin: float
    """logit(yes) - logit(no): the score before the sigmoid, which keeps apart what rounds to the same score."""
    fused: float | None = None
    """What the ranking is ordered by if it is fused with the first stage's; comparable within one query only."""


@dataclass(frozen=True)
class BackfillReport:
    """What an adapter's `backfill` found in a store, and did, in documents."""

    n_checked: int
    """Read from the store."""
    n_missing: int
    """Had no encoding."""
    n_stale: int
    """Had one of another checkpoint, setting or text, or a damaged one."""
    n_failed: int = 0
    """Of the missing and the stale, those that the store did not take; each is in the log."""


@dataclass(frozen=True)
class RuntimeStats:
    """What a reranker has done since it was made. Counts are of passages, duplicates within a call counted once."""

    passages_encoded: int = 0
    cache_hits: int = 0
    """Served without encoding, from metadata or from memory."""
    metadata_hits: int = 0
    """Served from the encoding that came with the passage; part of `cache_hits`."""
    cache_misses: int = 0
    """Had to be encoded; stale and corrupt ones included."""
    stale: int = 0
    """Came with a sound encoding of another checkpoint, setting or text."""
    corrupt: int = 0
    """Came with something that is not an encoding, or a damaged one."""
    coarser: int = 0
    """Came with an encoding coarser than `compression_ratio`, and were scored at its ratio."""
    truncated: int = 0
    """Longer than `max_passage_tokens` when encoded."""
    passages_scored: int = 0
    prefix_hits: int = 0
    """Scored from prefix states in memory: the decoder read only the query's own tokens."""
    prefix_store_hits: int = 0
    """Scored from prefix states in the `prefix_store`."""
    prefix_misses: int = 0
    """Prefix states had to be computed."""
    encode_seconds: float = 0.0
    score_seconds: float = 0.0


@runtime_checkable
class Reranker(Protocol):
    """What adapters need of a reranker; `KalmReranker` and `testing.FakeReranker` have it."""

    @property
    def fingerprint(self) -> str:
        """What made an encoding: checkpoint and encoder settings."""

    @property
    def stats(self) -> RuntimeStats:
        """A snapshot of the counters."""

    def warm_up(self, *, encoder: bool = True, decoder: bool = True) -> None:
        """Load weights now instead of when they are first needed."""

    def encode_to_metadata(self, texts: Sequence[str], show_progress: bool = False) -> list[dict[str, str]]:
        """Encode passages and return for each, in order, the metadata to store: `kalm_encoding` and `kalm_fp`."""

    def find_unencoded(self, passages: Sequence[Passage]) -> list[int]:
        """Return the indices of the passages whose encoding is missing, corrupt, or of another text or model."""

    def score(self, query: str, passages: Sequence[AnyPassage], instruction: str | None = None) -> list[float]:
        """Return P(yes) of each passage, in order."""

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
        """Return passages, best first."""

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


def is_reranker(value: object) -> bool:
    """Return whether a value can stand in for a reranker.

    Unlike `isinstance(value, Reranker)` this reads no property: for the fingerprint a whole checkpoint may have to be hashed.
    """
    return hasattr(type(value), "rank") and hasattr(type(value), "encode_to_metadata")
