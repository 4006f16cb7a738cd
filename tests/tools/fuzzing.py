"""How long the fuzz tests run: short in `make test`, longer on demand."""

from __future__ import annotations

import os


def rounds(default: int) -> int:
    """Return how many inputs to try: `KALM_FUZZ_ROUNDS` if it is set."""
    return int(os.environ.get("KALM_FUZZ_ROUNDS", default))
