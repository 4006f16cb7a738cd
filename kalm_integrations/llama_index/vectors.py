"""Access to vector stores, which hold a node as JSON in a payload, and its metadata beside it."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from llama_index.core.schema import BaseNode

from kalm_integrations.hosting import qdrant
from kalm_integrations.hosting.stores import PAGE_SIZE, Changes, DocumentAccess, DocumentId, Label, PagedIds, merged
from kalm_integrations.llama_index.held import CONTENT, change_payload, ids_in_table, known


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
        return PagedIds(self._pages(without), self._table().count_rows() if without is None else None)

    def _pages(self, without: Label | None) -> Iterator[list[DocumentId]]:
        # One query sees one version of the table, whatever is written meanwhile.
        table = self._table()
        query = table.search()
        if without is None:
            query = query.select(["id"])
        elif without.key in _payload_fields(table.schema):
            field = f"metadata.`{without.key}`"
            query = query.select(["id"]).where(f"{field} is null or {field} != {_literal(without.fingerprint)}")
        else:
            query = query.select({"id": "id", "content": f"metadata.{CONTENT}"})
        for batch in query.to_batches(PAGE_SIZE):
            contents = batch.to_pydict().get("content")
            ids = batch["id"].to_pylist()
            if contents is not None and without is not None:
                held = zip(ids, contents, strict=True)
                ids = [i for i, content in held if not without.is_on(json.loads(content)["metadata"])]
            yield ids

    def add_metadata(self, changes: Changes) -> None:
        added, table = _by_text(changes), self._table()
        found = table.search().where(_among("id", added)).select(["id", "metadata"]).to_arrow()
        fields = _payload_fields(found.schema)
        rows = {row["id"]: row["metadata"] for row in found.to_pylist()}
        contents = [payload[CONTENT] for payload in rows.values()]
        changed = {i: merged(payload, change_payload(payload, added[i])) for i, payload in rows.items()}
        written = [{"id": i, "metadata": {key: p.get(key) for key in fields}} for i, p in changed.items()]
        if written:
            # What is written holds the whole node: it must still be the one that was read.
            unchanged = _among(f"target.metadata.{CONTENT}", contents)
            merge = table.merge_insert("id").when_matched_update_all(where=unchanged)
            merge.execute(type(found).from_pylist(written, schema=found.schema))

    def _get(self, ids: list[str]) -> list[BaseNode]:
        self._table()
        # Its own condition for ids has quotes that LanceDB takes for those of a column.
        found: list[BaseNode] = self._store.get_nodes(where=_among("id", ids))
        return found

    def _table(self) -> Any:
        table = self._store.table
        # Otherwise it stays at the version that it was opened at or that it wrote.
        table.checkout_latest()
        return table


def _payload_fields(schema: Any) -> list[str]:
    return [field.name for field in schema.field("metadata").type]


def _literal(text: str) -> str:
    quoted = text.replace("'", "''")
    return f"'{quoted}'"


def _among(field: str, texts: Iterable[str]) -> str:
    return f"{field} in ({', '.join(map(_literal, texts))})"


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
