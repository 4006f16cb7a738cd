"""Payloads of Qdrant's points: written by id, which costs local mode nothing however many points there are."""

from __future__ import annotations

from typing import Any

import pytest
from qdrant_client import QdrantClient, models

from kalm_integrations.hosting.qdrant import PayloadChange, add_payloads

COLLECTION = "pages"


@pytest.fixture
def client() -> QdrantClient:
    client = QdrantClient(":memory:")
    client.create_collection(COLLECTION, models.VectorParams(size=2, distance=models.Distance.COSINE))
    points = [models.PointStruct(id=i, vector=[1.0, i], payload={"metadata": {"page": i}}) for i in range(3)]
    client.upsert(COLLECTION, points)
    return client


def payloads(client: QdrantClient) -> dict[Any, Any]:
    return {point.id: point.payload["metadata"] for point in client.retrieve(COLLECTION, [0, 1, 2])}


@pytest.mark.parametrize("gone", [None, 0])
def test_no_filter_is_needed_where_all_points_are_there(
    client: QdrantClient, monkeypatch: pytest.MonkeyPatch, gone: int | None
):
    """A filter would go through all points of the collection; with a point gone it is what lets the others be written."""
    if gone is not None:
        client.delete(COLLECTION, [gone])
    operations: list[models.SetPayloadOperation] = []
    update = client.batch_update_points

    def watch(name: str, given: list[models.SetPayloadOperation]) -> object:
        operations.extend(given)
        return update(name, given)

    monkeypatch.setattr(client, "batch_update_points", watch)
    add_payloads(client, COLLECTION, [PayloadChange(i, {"kalm_fp": str(i)}) for i in (0, 1)], "metadata")
    expected = {i: {"page": i, **({"kalm_fp": str(i)} if i < 2 else {})} for i in range(3) if i != gone}
    assert payloads(client) == expected
    assert [operation.set_payload.filter is None for operation in operations] == [gone is None] * 2
