"""How long a fuzz test goes on."""

from __future__ import annotations

import os


def rounds(default: int) -> int:
    """Return how many rounds to fuzz: KALM_FUZZ_ROUNDS if it is set (`make fuzz` does), else the test's own number."""
    return int(os.environ.get("KALM_FUZZ_ROUNDS", default))
