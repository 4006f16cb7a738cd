"""Access to vector stores, which hold a node as JSON in a payload, and its metadata beside it."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.utils import metadata_dict_to_node

from kalm_integrations.hosting import qdrant
from kalm_integrations.hosting.stores import PAGE_SIZE, Changes, DocumentAccess, DocumentId, Label, PagedIds, merged
from kalm_integrations.llama_index.held import CONTENT, change_payload, ids_in_table, known

_CONTENTS = 100
"""Whole nodes that are asked for at a time."""


def vector_store_access(store: object) -> DocumentAccess[BaseNode] | None:
    """Return the access to a vector store that is known here."""
    kind = known(store, _KINDS)
    return None if kind is None else kind(store)


class AnyVectorStore:
    """Any vector store with `get_nodes`, for reading only."""

    def __init__(self, store: Any) -> None:
        """Keep the store."""
        self._store = store

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, BaseNode]:
        """Return nodes by id."""
        given = {str(i): i for i in ids}
        # No ids would be all nodes.
        nodes = self._get(list(given)) if given else []
        return {given.get(node.node_id, node.node_id): node for node in nodes}

    def _get(self, ids: list[str]) -> list[BaseNode]:
        found: list[BaseNode] = self._store.get_nodes(ids)
        return found


class _Chroma(AnyVectorStore):
    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        # All at once, and nothing but ids: pages by offset would skip nodes when others delete some, or get a label.
        where = None if without is None else {without.key: {"$ne": without.fingerprint}}
        return list(self._store.client.get(where=where, include=[])["ids"])

    def add_metadata(self, changes: Changes) -> None:
        # Chroma writes nothing on a condition, so what it holds is read at the last moment.
        held = self._store.client.get(ids=list(map(str, changes)), include=["metadatas"])
        added = _by_text(changes)
        payloads = [change_payload(p or {}, added[i]) for i, p in zip(held["ids"], held["metadatas"], strict=True)]
        if payloads:
            self._store.client.update(held["ids"], metadatas=payloads)


class _Qdrant(AnyVectorStore):
    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        found = qdrant.find_ids(self._store.client, self._store.collection_name, None, without)
        return PagedIds(([str(point_id)] for point_id in found), operator.length_hint(found))

    def add_metadata(self, changes: Changes) -> None:
        client, collection = self._store.client, self._store.collection_name
        added, written = _by_text(changes), []
        for point in client.retrieve(collection, list(added)):
            # What is written holds the whole node: it must still be the one that was read.
            unchanged = (CONTENT, point.payload[CONTENT]) if CONTENT in point.payload else None
            written.append(qdrant.PayloadChange(point.id, change_payload(point.payload, added[str(point.id)]), unchanged))
        qdrant.add_payloads(client, collection, written)


class _Postgres(AnyVectorStore):
    """By its table: a node is the JSON in one of its columns, whose order of keys SQL's own functions would change."""

    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        self._store._initialize()  # noqa: SLF001
        table = self._store._table_class  # noqa: SLF001
        outdated = [] if without is None else [table.metadata_[without.key].astext.is_distinct_from(without.fingerprint)]
        # To count those that lack a label, each payload would have to be parsed once more.
        return ids_in_table(self._store._session, table.id, table.node_id, outdated, is_counted=not outdated)  # noqa: SLF001

    def add_metadata(self, changes: Changes) -> None:
        self._store._initialize()  # noqa: SLF001
        table, added = self._store._table_class, _by_text(changes)  # noqa: SLF001
        with self._store._session() as session, session.begin():  # noqa: SLF001
            held = session.query(table.id, table.node_id, table.metadata_).filter(table.node_id.in_(list(added)))
            # Locked, in one order for all: between reading and writing nothing comes.
            for row in held.order_by(table.id).with_for_update().all():
                payload = merged(row.metadata_, change_payload(row.metadata_, added[row.node_id]))
                session.query(table).filter_by(id=row.id).update({"metadata_": payload}, synchronize_session=False)


class _LanceDB(AnyVectorStore):
    """By its table, a new version of which each batch makes.

    The fields beside a node's JSON are fixed when the table is made: an encoding that has no field is in the JSON only.
    """

    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        table = self._table()
        # One query sees one version of the table, whatever is written meanwhile.
        if without is None:
            batches = table.search().select(["id"]).to_batches(PAGE_SIZE)
            return PagedIds((batch["id"].to_pylist() for batch in batches), table.count_rows())
        # All metadata, because LanceDB picks no field where rows were added that lack some.
        batches = table.search().select(["id", "metadata"]).to_batches(_CONTENTS)
        return PagedIds([row["id"] for row in batch.to_pylist() if not _is_on(row, without)] for batch in batches)

    def add_metadata(self, changes: Changes) -> None:
        added = _by_text(changes)
        while True:
            table = self._table()
            found = self._rows(table, list(added))
            rows = {row["id"]: row for row in found.to_pylist()}
            if not rows:
                return
            schema = found.schema.remove(found.schema.get_field_index("_rowaddr"))
            names = [field.name for field in schema.field("metadata").type]
            written = []
            for i, row in rows.items():
                payload = merged(row["metadata"], change_payload(row["metadata"], added[i]))
                written.append({"id": i, "metadata": {name: payload.get(name) for name in names}})
            # What is written holds the whole node: it takes the place of the very row that was read. A row that others have
            # written anew meanwhile is read again.
            addresses = ", ".join(str(row["_rowaddr"]) for row in rows.values())
            merge = table.merge_insert("id").when_matched_update_all(where=f"target._rowaddr in ({addresses})")
            if merge.execute(type(found).from_pylist(written, schema=schema)).num_updated_rows == len(rows):
                return

    def _get(self, ids: list[str]) -> list[BaseNode]:
        # Not by the store's get_nodes, whose condition has quotes that LanceDB takes for those of a column.
        return [metadata_dict_to_node(row["metadata"]) for row in self._rows(self._table(), ids).to_pylist()]

    @staticmethod
    def _rows(table: Any, ids: list[str]) -> Any:
        # In two steps: where rows were added that lack a field of the metadata, LanceDB answers no query with a condition.
        quoted = "', '".join(i.replace("'", "''") for i in ids)
        found = table.search().where(f"id in ('{quoted}')").select(["id"]).with_row_id(True).to_arrow()
        return table.take_row_ids(found["_rowid"].to_pylist()).select(["id", "metadata", "_rowaddr"]).to_arrow()

    def _table(self) -> Any:
        table = self._store.table
        # Otherwise it stays at the version that it was opened at or that it wrote.
        table.checkout_latest()
        return table


def _is_on(row: Mapping[str, Any], label: Label) -> bool:
    return label.is_on(json.loads(row["metadata"][CONTENT])["metadata"])


def _by_text(changes: Changes) -> dict[str, Any]:
    """Return changes by the ids that nodes have: texts, also where rows that are loaded have numbers."""
    return {str(document_id): added for document_id, added in changes.items()}


# By name, so that no store's package is imported.
_KINDS: dict[str, Callable[[Any], DocumentAccess[BaseNode]]] = {
    "ChromaVectorStore": _Chroma,
    "QdrantVectorStore": _Qdrant,
    "PGVectorStore": _Postgres,
    "LanceDBVectorStore": _LanceDB,
}

KNOWN_VECTOR_STORES = tuple(_KINDS)
