"""A service as a process, one within this process, and one without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from fastapi.testclient import TestClient
from tools.services import Running, in_process, kalm_serve

from kalm_integrations.core.base import Reranker
from kalm_integrations.serving.app import create_app
from kalm_integrations.serving.settings import ServiceSettings
from kalm_integrations.testing import FakeReranker

KEY = "k3y-of-the-tests"


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`kalm serve` with the built-in model, under names that clients of others may send."""
    with kalm_serve(tmp_path_factory.mktemp("service"), "--name", "rerank-v3.5", "--name", "jina-reranker-v2") as running:
        yield running


@pytest.fixture
def make_client() -> Iterator[Callable[..., TestClient]]:
    """Makes a client of a service within this process; a fake ranks unless another reranker is given."""
    with ExitStack() as stack:

        def make(reranker: Reranker | None = None, **settings: object) -> TestClient:
            given = FakeReranker() if reranker is None else reranker
            app = create_app(ServiceSettings.make(**{"model": "fake", **settings}), lambda _: given)
            client = stack.enter_context(TestClient(app, raise_server_exceptions=False))
            while client.get("/ready").status_code != 200:
                pass
            return client

        yield make


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Serves within this process, over sockets; returns the URL."""
    with ExitStack() as stack:

        def serve(reranker: Reranker | None = None, **settings: object) -> str:
            given = FakeReranker() if reranker is None else reranker
            app = create_app(ServiceSettings.make(**{"model": "fake", **settings}), lambda _: given)
            return stack.enter_context(in_process(app))

        yield serve


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    """A key, and the environment variable KALM_TEST_KEY that holds it."""
    monkeypatch.setenv("KALM_TEST_KEY", KEY)
    return KEY
