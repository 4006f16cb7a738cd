"""A checkpoint of Nano's real shape: loads in little more than its text weights, and scores as the reference does."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tools.parity import TOLERANCE
from tools.real_shape import make_nano, measure, print_table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nano() -> Iterator[Path]:
    # Not pytest's own folder, which keeps the last runs: each is 1.6 GB.
    with tempfile.TemporaryDirectory() as folder:
        make_nano(Path(folder))
        yield Path(folder)


def test_memory_and_scores(nano: Path) -> None:
    """Peak memory stays within 1.15 times the text weights, the vision tower aside, through load and first score."""
    ours, reference = measure("ours", nano), measure("reference", nano)
    print_table(ours, reference)
    assert ours["scores"] == pytest.approx(reference["scores"], abs=TOLERANCE)
    assert ours["peak"] <= 1.15 * ours["text_weights"]
