"""KalmRerank: reranks retrieved nodes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle

from kalm_integrations.core.base import Reranker
from kalm_integrations.core.types import RankedPassage, Ranking
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting.documents import RETRIEVAL_SCORE_KEY, added_metadata, checked_documents, only_encodings
from kalm_integrations.hosting.fields import Count, RerankFields
from kalm_integrations.hosting.pruning import Excerpt
from kalm_integrations.hosting.ranking import HostQuery, arank, rank
from kalm_integrations.llama_index.nodes import (
    NodeFields,
    stripped,
    to_passage,
    unmarked,
    with_encoding,
    with_hidden_metadata,
    with_text,
)

dispatcher = get_dispatcher(__name__)

WriteBack: TypeAlias = Callable[[Sequence[BaseNode]], object]
"""Takes nodes that were encoded during a query, as copies that carry the encoding; `write_back_to` makes one for a store."""

Fetch: TypeAlias = Callable[[Sequence[BaseNode]], Sequence[Any]]
"""Takes nodes that came without an encoding, and returns for each its encoding or None; `fetch_from` makes one for a store."""


class KalmRerank(NodeFields, RerankFields, BaseNodePostprocessor):
    """Reranks nodes, best first, with the encodings that they carry; what has none is encoded.

    Returns copies with the score P(yes), a float between 0 and 1, and without encodings.

    ```python
    query_engine = index.as_query_engine(similarity_top_k=50, node_postprocessors=[KalmRerank("pico", top_n=5)])
    ```
    """

    top_n: Count = 5
    """How many nodes to return at most; None returns all."""
    keep_retrieval_score: bool = False
    """Keep the score that a node came with as metadata `retrieval_score`, hidden from LLMs and embedding models."""

    def __init__(self, model: str | os.PathLike[str] | Reranker = "pico", **settings: Any) -> None:
        """Check and keep settings; nothing is loaded.

        Args:
            model: an alias, a hub id, a folder, the address of a service, or a reranker to share; the last two bring
                settings of their own.
            **settings: the fields of the class.

        Raises:
            SettingsError: a setting is unknown, breaks a rule, or is given beside a reranker that has its own.
        """
        super().__init__(model=model, **settings)

    @classmethod
    def class_name(cls) -> str:
        """Name in serialised form."""
        return "KalmRerank"

    def shared_parts(self) -> Iterator[object]:
        """Yield what copies of the component share instead of copying it."""
        yield from super().shared_parts()
        yield self.callback_manager

    def _postprocess_nodes(
        self, nodes: Iterable[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query, given = _checked(nodes, query_bundle)
        if not given:
            return []
        with self._reported(query, given) as outcome:
            outcome.ranking = rank(self._query(query.query_str, given))
        return outcome.nodes

    async def _apostprocess_nodes(
        self, nodes: Iterable[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query, given = _checked(nodes, query_bundle)
        if not given:
            return []
        with self._reported(query, given) as outcome:
            outcome.ranking = await arank(self._query(query.query_str, given))
        return outcome.nodes

    @contextmanager
    def _reported(self, query: QueryBundle, given: Sequence[NodeWithScore]) -> Iterator[_Outcome]:
        """Tell handlers of a query, and make the nodes to return of the ranking that it leads to."""
        key = self.encoding_key
        # What handlers see, now and as the result, is without encodings.
        shown = [node.model_copy(update={"node": stripped(node.node, key)}) for node in given]
        top_n = len(given) if self.top_n is None else self.top_n
        model = self.model if isinstance(self.model, str) else type(self.model).__name__
        dispatcher.event(ReRankStartEvent(query=query, nodes=shown, top_n=top_n, model_name=model))
        payload: dict[str, Any] = {
            EventPayload.NODES: shown,
            EventPayload.MODEL_NAME: model,
            EventPayload.QUERY_STR: query.query_str,
            EventPayload.TOP_K: top_n,
        }
        outcome = _Outcome()
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            yield outcome
            nodes = [shown[place.index] for place in outcome.ranking]
            excerpts = [self.excerpt(_text(node), place) for node, place in zip(nodes, outcome.ranking, strict=True)]
            ranked = [self._output(*row) for row in zip(nodes, outcome.ranking, excerpts, strict=True)]
            event.on_end(payload={EventPayload.NODES: ranked})
        dispatcher.event(ReRankEndEvent(nodes=ranked))
        if self.strip_encodings:
            outcome.nodes = ranked
            return
        # An encoding does not fit a text that was cut.
        kept = [
            only_encodings(given[place.index].metadata, key) if excerpt.text is None else {}
            for place, excerpt in zip(outcome.ranking, excerpts, strict=True)
        ]
        outcome.nodes = [
            node.model_copy(update={"node": with_hidden_metadata(node.node, metadata)})
            for node, metadata in zip(ranked, kept, strict=True)
        ]

    def _query(self, query: str, nodes: Sequence[NodeWithScore]) -> HostQuery[BaseNode]:
        key = self.encoding_key
        return HostQuery(
            self,
            self,
            query,
            [node.node for node in nodes],
            [to_passage(node.node, key, self.metadata_mode) for node in nodes],
            [node.node_id for node in nodes],
            lambda index: stripped(nodes[index].node, key),
            lambda node, metadata: with_encoding(node, metadata, key),
            top_k=self.top_n,
            first_stage_scores=[node.score for node in nodes] if self.fusion == "z_score" else None,
        )

    def _output(self, node: NodeWithScore, place: RankedPassage, excerpt: Excerpt) -> NodeWithScore:
        added: dict[str, object] = {RETRIEVAL_SCORE_KEY: node.score} if self.keep_retrieval_score and place.is_scored else {}
        made = with_hidden_metadata(unmarked(node.node), added | dict(added_metadata(place)) | excerpt.metadata)
        if excerpt.text is not None:
            made = with_text(made, excerpt.text)
        return node.model_copy(update={"node": made} | ({"score": place.score} if place.is_scored else {}))


class _Outcome:
    """What a query led to."""

    ranking: Ranking
    nodes: list[NodeWithScore]


def _text(node: NodeWithScore) -> str:
    return node.node.get_content(MetadataMode.NONE)


def _checked(nodes: Iterable[NodeWithScore], query_bundle: QueryBundle | None) -> tuple[QueryBundle, list[NodeWithScore]]:
    if query_bundle is None:
        msg = "Missing query bundle in extra info. KalmRerank needs a query, but got None; pass query_str or query_bundle"
        raise SettingsError(msg)
    return query_bundle, checked_documents(nodes, NodeWithScore, KalmRerank.class_name())
