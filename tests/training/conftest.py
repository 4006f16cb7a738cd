"""What the tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tools.training_data import ARCHITECTURE, PASSAGES, QUERIES, examples, write_lines

from kalm_integrations.training.initialize import create_checkpoint
from kalm_integrations.training.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new model, as a run from nothing starts with."""
    folder = tmp_path_factory.mktemp("fresh")
    train_tokenizer([*PASSAGES, *QUERIES] * 10, ARCHITECTURE.vocabulary_size, folder)
    create_checkpoint(ARCHITECTURE, folder, seed=0)
    return folder


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "lines.jsonl", examples())
