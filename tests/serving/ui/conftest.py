"""Clients of a service that has the page: of a fake, and of the built-in model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from fastapi.testclient import TestClient
from tools.waiting import until

from kalm_integrations import KalmReranker
from kalm_integrations.corpora.candidates import Candidate
from kalm_integrations.serving.app import create_app
from kalm_integrations.serving.service import open_kalm
from kalm_integrations.serving.settings import ServiceSettings
from kalm_integrations.serving.ui.collection import Collection, Page
from kalm_integrations.testing import FakeReranker


@pytest.fixture
def make_page() -> Iterator[Callable[..., TestClient]]:
    """Makes a client of the page, of the settings' model or of a fake."""
    with ExitStack() as stack:

        def make(collection: Collection | None = None, *, address: str = "http://localhost", **settings: object) -> TestClient:
            given = ServiceSettings.make(**{"model": "fake", **settings})
            open_reranker = (lambda _: FakeReranker()) if given.model == "fake" else open_kalm
            app = create_app(given, open_reranker, page=Page(collection))
            client = stack.enter_context(TestClient(app, address, raise_server_exceptions=False))
            until(lambda: client.get("/ready").status_code == 200)
            return client

        yield make


@pytest.fixture
def make_collection() -> Callable[..., Collection]:
    """Makes a collection of texts, or of rows."""

    def make(rows: list[str] | list[dict[str, str]], limit: int = 100) -> Collection:
        given = [row if isinstance(row, dict) else {"text": row} for row in rows]
        return Collection("p.jsonl", [Candidate(f"p.jsonl:{n}", n, row, row["text"]) for n, row in enumerate(given, 1)], limit)

    return make


@pytest.fixture(scope="session")
def pico() -> KalmReranker:
    """The built-in model as nobody else uses it."""
    return KalmReranker.from_pretrained("pico")
