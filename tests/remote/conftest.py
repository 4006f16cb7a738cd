"""A service with a fake or a tiny model behind it, and a client of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from tools.stub_service import Service, serve

from kalm_integrations import KalmReranker
from kalm_integrations.testing import FakeReranker


@pytest.fixture
def fake() -> Iterator[Service]:
    """A service on a fake."""
    with serve(FakeReranker()) as service:
        yield service


@pytest.fixture
def tiny(make_reranker: Callable[..., KalmReranker]) -> Iterator[Service]:
    """A service on the tiny checkpoint."""
    with serve(make_reranker()) as service:
        yield service
