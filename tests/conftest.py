"""Offline by force, and the checkpoints that tests share."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "false"

from collections.abc import Callable
from pathlib import Path

import pytest
from tools.checkpoints import make_checkpoint

from kalm_integrations import KalmReranker


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random T5Gemma2 checkpoint with everything switched on: windows, scaled RoPE, soft cap, grouped heads."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture and tokenizer with other weights."""
    return make_checkpoint(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture
def make_reranker(tiny_checkpoint: Path) -> Callable[..., KalmReranker]:
    """Makes a reranker with empty caches on the tiny checkpoint, which rounds no encoding unless a test wants it to."""

    def make(model: Path = tiny_checkpoint, **settings: object) -> KalmReranker:
        return KalmReranker.from_pretrained(model, **{"storage_codec": "fp32", **settings})

    return make


@pytest.fixture(scope="session")
def cross_encoder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random cross-encoder of sentence-transformers."""
    from tools.peers import make_cross_encoder

    return make_cross_encoder(tiny_checkpoint, tmp_path_factory.mktemp("peer"))


@pytest.fixture(scope="session")
def bi_encoder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random bi-encoder of sentence-transformers."""
    from tools.peers import make_bi_encoder

    return make_bi_encoder(tiny_checkpoint, tmp_path_factory.mktemp("peer"))
