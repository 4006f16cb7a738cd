"""Values that a shell completes. Where none begins as what was typed, bash goes on with files and folders."""

from __future__ import annotations

from collections.abc import Iterable


def models(incomplete: str) -> list[str]:
    """Complete the alias of a checkpoint."""
    from kalm_integrations.core.checkpoint.locate import ALIASES, BUILT_IN_ALIASES

    return _beginning((*BUILT_IN_ALIASES, *ALIASES), incomplete)


def codecs(incomplete: str) -> list[str]:
    """Complete the name of a codec."""
    from kalm_integrations.core.settings import CODEC_NAMES

    return _beginning(CODEC_NAMES, incomplete)


def ratios(incomplete: str) -> list[str]:
    """Complete a compression ratio that checkpoints are published for."""
    from kalm_integrations.core.settings import COMPRESSION_RATIOS

    return _beginning(map(str, COMPRESSION_RATIOS), incomplete)


def codec_lists(incomplete: str) -> list[str]:
    """Complete the last of several codecs."""
    before, comma, last = incomplete.rpartition(",")
    return [before + comma + codec for codec in codecs(last)]


def ratio_lists(incomplete: str) -> list[str]:
    """Complete the last of several ratios."""
    before, comma, last = incomplete.rpartition(",")
    return [before + comma + ratio for ratio in ratios(last)]


def devices(incomplete: str) -> list[str]:
    """Complete a device; torch, which knows those that are there, takes too long to load."""
    return _beginning(("cpu", "cuda", "mps"), incomplete)


def dtypes(incomplete: str) -> list[str]:
    """Complete what a run is computed in."""
    return _beginning(("float32", "bfloat16"), incomplete)


def prefix_dtypes(incomplete: str) -> list[str]:
    """Complete what prefix states are kept in."""
    return _beginning(("float32", "bfloat16", "float16", "int8"), incomplete)


def long_passages(incomplete: str) -> list[str]:
    """Complete what becomes of long passages."""
    return _beginning(("windows", "cut"), incomplete)


def _beginning(values: Iterable[str], incomplete: str) -> list[str]:
    return [value for value in values if value.startswith(incomplete)]
