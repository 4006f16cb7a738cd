"""How long tests with random input go on."""

from __future__ import annotations

import os


def rounds(default: int) -> int:
    """Return how many inputs to try: KALM_FUZZ_ROUNDS, or a few."""
    return int(os.environ.get("KALM_FUZZ_ROUNDS", default))
