"""Servers that the adapter tests talk to, started once per test session on this machine."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tools import servers


@pytest.fixture(scope="session")
def postgres_uri() -> Iterator[str]:
    """A libpq URI of a PostgreSQL with the pgvector extension; give tables and collections names of your own."""
    with servers.postgres() as uri:
        yield uri


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an empty Redis that keeps nothing on disk."""
    with servers.redis(tmp_path_factory.mktemp("redis")) as (url, _):
        yield url


@pytest.fixture
def mortal_redis(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The URL of a Redis of one's own, and its process, which may be killed."""
    with servers.redis(tmp_path) as server:
        yield server
