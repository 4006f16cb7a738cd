"""How long fuzz tests run: short in `make test`, long in `make fuzz`."""

from __future__ import annotations

import os


def rounds(default: int) -> int:
    """Return how many inputs to try: the environment's KALM_FUZZ_ROUNDS, or the default."""
    return int(os.environ.get("KALM_FUZZ_ROUNDS", default))
