"""Nodes as stores hold them: JSON that is changed in place, and payloads with a node's JSON beside a copy of its metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from kalm_integrations.hosting.stores import PAGE_SIZE, DocumentId, PagedIds, merged, split_change

T = TypeVar("T")

CONTENT = "_node_content"
"""Payload key of the JSON that vector stores read a node from; the metadata beside it serve filters only."""


def known(store: object, kinds: Mapping[str, T]) -> T | None:
    """Look up a store's class by name: this package does not need those of the stores."""
    return next((kinds[base.__name__] for base in type(store).__mro__ if base.__name__ in kinds), None)


def change_payload(held: Mapping[str, Any], added: Mapping[str, str | None]) -> dict[str, Any]:
    """Return what to merge into a vector store's payload of a node; None takes a key away."""
    if CONTENT not in held:
        # Not written by the framework, which then reads the payload itself as metadata.
        return dict(added)
    node = json.loads(held[CONTENT])
    change_node(node, added)
    return {**added, CONTENT: json.dumps(node, ensure_ascii=False)}


def change_node(node: dict[str, Any], added: Mapping[str, str | None]) -> None:
    """Add metadata to a node's JSON; what is hidden from prompts and embeddings is hidden before it is there."""
    kept, _ = split_change(added)
    for hidden in ("excluded_embed_metadata_keys", "excluded_llm_metadata_keys"):
        others = [key for key in node[hidden] if key in kept or key not in added]
        node[hidden] = list(dict.fromkeys([*others, *kept]))
    # A new dict: a reader may be going through the old one.
    node["metadata"] = merged(node["metadata"], added)


def ids_in_table(
    open_session: Callable[[], Any], primary_key: Any, document_id: Any, conditions: Sequence[Any], *, is_counted: bool
) -> PagedIds:
    """Return ids from a table, page by page along its primary key: no row is skipped while others come, go or change.

    Args:
        open_session: makes a session of SQLAlchemy.
        primary_key: the column, of positive whole numbers.
        document_id: the column with the ids.
        conditions: on the rows.
        is_counted: count them first, for a progress bar.
    """

    def pages() -> Iterator[list[DocumentId]]:
        last = 0
        while True:
            with open_session() as session:
                query = session.query(primary_key, document_id).filter(primary_key > last, *conditions)
                rows = query.order_by(primary_key).limit(PAGE_SIZE).all()
            if not rows:
                return
            yield [found for _, found in rows]
            last = rows[-1][0]

    if not is_counted:
        return PagedIds(pages())
    with open_session() as session:
        return PagedIds(pages(), session.query(primary_key).filter(*conditions).count())
