"""What stored encodings hold, added up, and how long they would be at other ratios and codecs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from kalm_integrations.core.passages.encoding import EncodedPassage
from kalm_integrations.core.settings import CODEC_NAMES, poolable_ratios

FACTS = ("fingerprint", "ratio", "codec", "width")


@dataclass
class EncodingSummary:
    """Sums over encodings, which themselves are not kept."""

    n_encodings: int = 0
    n_tokens: int = 0
    n_characters: int = 0
    n_windows: Counter[int] = field(default_factory=Counter)
    """How many encodings have how many windows; those of passages that were read in one piece have one."""
    values: dict[str, Counter[str | int]] = field(default_factory=lambda: {name: Counter() for name in FACTS})
    """How many encodings have which value, for each of FACTS."""
    totals: Counter[tuple[int, str]] = field(default_factory=Counter)
    """Characters of all encodings at a ratio and codec."""
    n_at_ratio: Counter[int] = field(default_factory=Counter)
    """Encodings that can be pooled to a ratio."""
    _lengths: dict[tuple[tuple[int, ...], bool, int, int], dict[tuple[int, str], int]] = field(default_factory=dict)

    def add(self, length: int, encoding: EncodedPassage) -> None:
        """Add an encoding whose metadata string has `length` characters."""
        self.n_encodings += 1
        self.n_tokens += encoding.n_tokens
        self.n_characters += length
        ratio, width = encoding.compression_ratio, encoding.states.shape[1]
        facts: tuple[str | int, ...] = (encoding.fingerprint, ratio, encoding.codec, width)
        for counter, value in zip(self.values.values(), facts, strict=True):
            counter[value] += 1
        tokens = encoding.window_tokens
        self.n_windows[len(tokens)] += 1
        # Lengths follow from these (states that overflow a codec aside), and most files have few different ones.
        key = (tokens, encoding.windows is None, ratio, width)
        if key not in self._lengths:
            self._lengths[key] = dict(_lengths(encoding))
        self.totals.update(self._lengths[key])
        self.n_at_ratio.update({ratio for ratio, _ in self._lengths[key]})

    def facts(self) -> dict[str, object]:
        """Return what the encodings have in common, or how many have what; at least one must have been added."""
        values = {name: _describe(counter) for name, counter in self.values.items()}
        in_windows = {n: count for n, count in self.n_windows.items() if n > 1}
        return {
            "encodings": self.n_encodings,
            **values,
            "in_windows": sum(in_windows.values()),
            "windows": sum(n * count for n, count in in_windows.items()),
            "tokens": self.n_tokens,
            "characters": self.n_characters,
        }

    def lengths(self) -> dict[int, dict[str, float]]:
        """Return the mean length by ratio and codec, for the ratios that every encoding can be pooled to."""
        ratios = sorted(ratio for ratio, n in self.n_at_ratio.items() if n == self.n_encodings)
        return {ratio: {codec: self.totals[ratio, codec] / self.n_encodings for codec in CODEC_NAMES} for ratio in ratios}


def _lengths(encoding: EncodedPassage) -> Iterable[tuple[tuple[int, str], int]]:
    for ratio in poolable_ratios(encoding.compression_ratio):
        pooled = encoding.pool(ratio)
        for codec in CODEC_NAMES:
            yield (ratio, codec), replace(pooled, codec=codec).metadata_length()


def _describe(counter: Counter[str | int]) -> str | int:
    if len(counter) == 1:
        return next(iter(counter))
    return ", ".join(f"{value} ({count:,})" for value, count in counter.most_common())
