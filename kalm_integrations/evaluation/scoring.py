"""How a reranker scores candidates at each ratio and codec."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from tqdm.auto import tqdm

from kalm_integrations.core.pairs import score_pairs
from kalm_integrations.core.passages.encoding import EncodedPassage
from kalm_integrations.core.reranker import KalmReranker
from kalm_integrations.core.settings import check_codec
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.first_stage import Candidates
from kalm_integrations.errors import SettingsError

EXACT = "fp32"
"""The codec that changes no state."""


@dataclass(frozen=True)
class Scored:
    """What a reranker makes of all candidates, from encodings at one ratio and codec."""

    ratio: int
    codec: str
    mean_bytes: float
    """Mean length of a passage's metadata string, which is ASCII."""
    margins: dict[str, list[float]]
    """By query id, in the first stage's order."""


def check_ratios_and_codecs(reranker: KalmReranker, ratios: Sequence[int], codecs: Sequence[str]) -> None:
    """Check what to score at, before any work.

    Raises:
        SettingsError: the reranker rounds what it encodes, a list is empty, a ratio is no multiple of the reranker's, or a
            codec is unknown.
    """
    if reranker.storage_codec != EXACT:
        got = reranker.storage_codec
        msg = f"codecs are measured from storage_codec={EXACT!r}, but the reranker's is {got!r}; open it with that one"
        raise SettingsError(msg)
    if not ratios or not codecs:
        msg = f"ratios and codecs must each name one at least, but got {list(ratios)} and {list(codecs)}"
        raise SettingsError(msg)
    for ratio in ratios:
        if ratio < 1 or ratio % reranker.compression_ratio:
            msg = f"ratios must be multiples of the reranker's compression_ratio={reranker.compression_ratio}, but got {ratio}"
            raise SettingsError(msg)
    for codec in codecs:
        check_codec(codec)


def encode_candidates(
    reranker: KalmReranker, collection: Collection, candidates: Mapping[str, Candidates], show_progress: bool = False
) -> dict[str, EncodedPassage]:
    """Encode each different candidate once, at the reranker's own ratio, and return the encodings by passage id."""
    ids = sorted({passage_id for found in candidates.values() for passage_id in found.ids})
    encodings = reranker.encode_passages([collection.passages[i] for i in ids], show_progress)
    return dict(zip(ids, encodings, strict=True))


def score_settings(
    reranker: KalmReranker,
    candidates: Mapping[str, Candidates],
    encoded: Mapping[str, EncodedPassage],
    ratios: Sequence[int],
    codecs: Sequence[str],
    show_progress: bool = False,
) -> Iterator[Scored]:
    """Score all candidates at every ratio and codec.

    Coarser ratios are pooled from `encoded`, and every encoding makes the round trip through its metadata string before it
    is scored; a passage is pooled once for each ratio and read once for each setting, whatever number of queries it serves.

    Args:
        reranker: scores.
        candidates: by query id.
        encoded: by passage id, at a ratio that divides all `ratios`.
        ratios: compression ratios; repeated ones count once.
        codecs: storage codecs; repeated ones count once.
        show_progress: draw a progress bar.
    """
    total = len(dict.fromkeys(ratios)) * len(dict.fromkeys(codecs)) * count_pairs(candidates)
    with tqdm(total=total, desc="Scoring", unit="pair", disable=not show_progress) as progress:
        for ratio in dict.fromkeys(ratios):
            pooled = {passage_id: encoding.pool(ratio) for passage_id, encoding in encoded.items()}
            for codec in dict.fromkeys(codecs):
                values = {i: replace(encoding, codec=codec).to_metadata() for i, encoding in pooled.items()}
                read = {i: EncodedPassage.from_metadata(value) for i, value in values.items()}
                margins = score_candidates(reranker, candidates, read, progress)
                yield Scored(ratio, codec, fmean(map(len, values.values())), margins)


def count_pairs(candidates: Mapping[str, Candidates]) -> int:
    """Return how many pairs of a query and a passage there are to score."""
    return sum(len(found.ids) for found in candidates.values())


def score_candidates(
    reranker: KalmReranker,
    candidates: Mapping[str, Candidates],
    encodings: Mapping[str, EncodedPassage],
    progress: tqdm[Any] | None = None,
) -> dict[str, list[float]]:
    """Return the margins of each query's candidates, in the first stage's order."""
    pairs = [(found.query, encodings[i]) for found in candidates.values() for i in found.ids]
    scored = iter(score_pairs(reranker, pairs, progress=None if progress is None else progress.update))
    return {query_id: [next(scored).margin for _ in found.ids] for query_id, found in candidates.items()}
