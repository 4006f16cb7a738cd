"""Access to document stores over a key-value store, by the entries of the latter.

`add_documents` would replace whole nodes, and write anew what the store knows of their source documents and the hashes by
which pipelines know what they have ingested.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from llama_index.core.constants import DATA_KEY
from llama_index.core.schema import BaseNode
from llama_index.core.storage.docstore.keyval_docstore import KVDocumentStore

from kalm_integrations.hosting.stores import PAGE_SIZE, Changes, DocumentAccess, DocumentId, Label, PagedIds
from kalm_integrations.llama_index.held import change_node, ids_in_table, known


def docstore_access(store: KVDocumentStore) -> DocumentAccess[BaseNode]:
    """Return the access to a document store over any key-value store."""
    kind = known(store._kvstore, _KINDS) or _AnyEntries  # noqa: SLF001
    return kind(store)


class _AnyEntries:
    """By all that the interface of key-value stores offers: it has no pages, and no condition on what is written."""

    def __init__(self, store: KVDocumentStore) -> None:
        self._store = store
        self._kvstore: Any = store._kvstore  # noqa: SLF001
        self._collection = store._node_collection  # noqa: SLF001

    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        entries: dict[str, Any] = self._kvstore.get_all(collection=self._collection)
        return [key for key, entry in entries.items() if _lacks(entry, without)]

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, BaseNode]:
        given = {str(i): i for i in ids}
        return {given[node.node_id]: node for node in self._store.get_nodes(list(given), raise_error=False)}

    def add_metadata(self, changes: Changes) -> None:
        for document_id, added in changes.items():
            self._change(str(document_id), added)

    def _change(self, key: str, added: Mapping[str, str | None]) -> None:
        if entry := self._kvstore.get(key, collection=self._collection):
            change_node(entry[DATA_KEY], added)
            self._kvstore.put(key, entry, collection=self._collection)


class _InMemory(_AnyEntries):
    def _change(self, key: str, added: Mapping[str, str | None]) -> None:
        # `get` returns a new dict with the node that is stored. Nothing is put, so an entry that has taken its place stays.
        if entry := self._kvstore.get(key, collection=self._collection):
            change_node(entry[DATA_KEY], added)


_REDIS_SCAN_KEYS = """
local cursor, entries = unpack(redis.call('hscan', KEYS[1], ARGV[1], 'count', ARGV[2]))
local keys = {}
for i = 1, #entries, 2 do keys[#keys + 1] = entries[i] end
return {cursor, keys}
"""

_REDIS_SET_IF_SAME = """
if redis.call('hget', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('hset', KEYS[1], ARGV[1], ARGV[3])
return 1
"""

_REDIS_ENTRIES = 100
"""Whole entries that are asked for at a time."""


class _Redis(_AnyEntries):
    @property
    def _client(self) -> Any:
        return self._kvstore._redis_client  # noqa: SLF001

    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        return PagedIds(self._pages(without), self._client.hlen(self._collection) if without is None else None)

    def _pages(self, without: Label | None) -> Iterator[list[DocumentId]]:
        # Redis may name an entry twice while others come.
        seen: set[DocumentId] = set()
        cursor: Any = 0
        while True:
            if without is None:
                cursor, keys = self._client.eval(_REDIS_SCAN_KEYS, 1, self._collection, cursor, PAGE_SIZE)
            else:
                cursor, entries = self._client.hscan(self._collection, cursor, count=_REDIS_ENTRIES)
                keys = [key for key, entry in entries.items() if _lacks(json.loads(entry), without)]
            found = [key for key in dict.fromkeys(key.decode() for key in keys) if key not in seen]
            seen.update(found)
            yield found
            if int(cursor) == 0:
                return

    def _change(self, key: str, added: Mapping[str, str | None]) -> None:
        while (held := self._client.hget(self._collection, key)) is not None:
            entry = json.loads(held)
            change_node(entry[DATA_KEY], added)
            if self._client.eval(_REDIS_SET_IF_SAME, 1, self._collection, key, held, json.dumps(entry)):
                return


class _Postgres(_AnyEntries):
    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        self._kvstore._initialize()  # noqa: SLF001
        table = self._kvstore._table_class  # noqa: SLF001
        conditions = [table.namespace == self._collection]
        if without is not None:
            held = table.value[DATA_KEY]["metadata"][without.key].astext
            conditions.append(held.is_distinct_from(without.fingerprint))
        # To count those that lack a label, each entry would have to be parsed once more.
        return ids_in_table(self._kvstore._session, table.id, table.key, conditions, is_counted=without is None)  # noqa: SLF001

    def _change(self, key: str, added: Mapping[str, str | None]) -> None:
        table = self._kvstore._table_class  # noqa: SLF001
        with self._kvstore._session() as session, session.begin():  # noqa: SLF001
            for row in session.query(table).filter_by(namespace=self._collection, key=key).with_for_update():
                node = dict(row.value[DATA_KEY])
                change_node(node, added)
                row.value = {**row.value, DATA_KEY: node}


_KINDS: dict[str, Callable[[KVDocumentStore], DocumentAccess[BaseNode]]] = {
    "SimpleKVStore": _InMemory,
    "RedisKVStore": _Redis,
    "PostgresKVStore": _Postgres,
}


def _lacks(entry: Mapping[str, Any], label: Label | None) -> bool:
    return label is None or not label.is_on(entry[DATA_KEY].get("metadata", {}))
