"""Qdrant's client, which stores of every host stand on: ids of points, payloads added on a condition, and left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from kalm_integrations.core.types import ENCODING_KEY
from kalm_integrations.hosting.documents import check_encoding_key
from kalm_integrations.hosting.stores import PAGE_SIZE, DocumentId, Label, PagedIds, split_change


@dataclass(frozen=True)
class PayloadChange:
    """What is to be added to the payload of a point."""

    point_id: str | int
    payload: Mapping[str, Any]
    """None takes a field away."""
    unchanged: tuple[str, str] | None = None
    """A field of the payload, none that is taken away, and what it must still hold; None makes no condition."""


class LeanQdrantClient:
    """A `QdrantClient` whose searches leave encodings out of the payloads; else it does what the client does that it is given.

    ```python
    store = QdrantVectorStore(LeanQdrantClient(QdrantClient("http://localhost:6333")), "pages", embeddings)
    rerank = KalmRerank(fetch=fetch_from(store))
    ```
    """

    def __init__(self, client: Any, *, metadata_payload_key: str = "metadata", encoding_key: str = ENCODING_KEY) -> None:
        """Search by a client.

        Args:
            client: a `QdrantClient`; it stays as it is.
            metadata_payload_key: the payload's field that holds the metadata; that of the store.
            encoding_key: metadata key of the encoding.
        """
        self._client = client
        field = f"{metadata_payload_key}.{check_encoding_key(encoding_key)}"
        self._payload = import_module("qdrant_client.models").PayloadSelectorExclude(exclude=[field])

    def __getattr__(self, name: str) -> Any:
        """Return what the client has."""
        if name == "_client":  # not set yet, as in a copy that is being made
            raise AttributeError(name)
        return getattr(self._client, name)

    def query_points(self, *args: Any, with_payload: Any = True, **kwargs: Any) -> Any:
        """Search; a payload that is asked for whole comes without encodings."""
        return self._client.query_points(*args, with_payload=self._payload if with_payload is True else with_payload, **kwargs)


def find_ids(client: Any, collection: str, key: str | None, without: Label | None) -> PagedIds:
    """Return the ids of the points that do not have a label, page by page; of all points for None.

    Args:
        client: a `QdrantClient`.
        collection: its name.
        key: the payload's field that holds the metadata; None if it is the payload itself.
        without: the label.
    """
    models = import_module("qdrant_client.models")
    outdated = None
    if without is not None:
        field = without.key if key is None else f"{key}.{without.key}"
        outdated = models.Filter(must_not=[_holds(models, field, without.fingerprint)])

    def pages() -> Iterator[list[DocumentId]]:
        offset = None
        while True:
            points, offset = client.scroll(collection, outdated, limit=PAGE_SIZE, offset=offset, with_payload=False)
            yield [point.id for point in points]
            if offset is None:
                return

    return PagedIds(pages(), client.count(collection, outdated).count)


def add_payloads(client: Any, collection: str, changes: Sequence[PayloadChange], key: str | None = None) -> None:
    """Add to the payloads of points and take from them, all else staying as it is; points that are gone are passed over.

    Args:
        client: a `QdrantClient`.
        collection: its name.
        changes: what to add, where.
        key: the payload's field that holds the metadata; None adds to the payload itself.
    """
    if not changes:
        return
    models = import_module("qdrant_client.models")
    is_conditional = any(change.unchanged for change in changes) and _takes_conditions(client, collection)
    ids = [change.point_id for change in changes]
    # By id, because in the client's local mode a filter goes through all points: a third of a second where there are 100,000.
    # But that stops at an id that is gone.
    are_all_there = not is_conditional and len(client.retrieve(collection, ids, with_payload=False)) == len(ids)
    operations = []
    for change in changes:
        where: dict[str, Any] = {"points": [change.point_id]}
        if not are_all_there:
            conditions = [models.HasIdCondition(has_id=[change.point_id])]
            if is_conditional and change.unchanged is not None:
                conditions.append(_holds(models, *change.unchanged))
            where = {"filter": models.Filter(must=conditions)}
        added, fields = split_change(change.payload)
        removed = [_path(key, field) for field in fields]
        # What is taken away first: the condition may be on a field that is set.
        if removed:
            operations.append(models.DeletePayloadOperation(delete_payload=models.DeletePayload(keys=removed, **where)))
        if added:
            operations.append(models.SetPayloadOperation(set_payload=models.SetPayload(payload=added, key=key, **where)))
    client.batch_update_points(collection, operations)


def _path(key: str | None, field: str) -> str:
    # Quoted, because a path takes dots apart.
    quoted = f'"{field}"'
    return quoted if key is None else f"{key}.{quoted}"


def _takes_conditions(client: Any, collection: str) -> bool:
    """Return whether a write may depend on a field without an index: strict mode, Qdrant Cloud's default, refuses that."""
    strict = client.get_collection(collection).config.strict_mode_config
    return strict is None or not strict.enabled or strict.unindexed_filtering_update is not False


def _holds(models: Any, field: str, value: str) -> Any:
    return models.FieldCondition(key=field, match=models.MatchValue(value=value))
