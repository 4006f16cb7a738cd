"""KalmRerank: reranks retrieved nodes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle
from pydantic import Field, PositiveInt, ValidationInfo, field_validator

from kalm_integrations.core.ranking import check_fusion
from kalm_integrations.core.types import FUSED_SCORE_KEY, FusionMethod, Passage, RankedPassage
from kalm_integrations.errors import EncodingError, SettingsError
from kalm_integrations.llama_index.component import RerankerComponent
from kalm_integrations.llama_index.nodes import RETRIEVAL_SCORE_KEY, attach, strip, to_passage, with_hidden_metadata

logger = logging.getLogger(__name__)
dispatcher = get_dispatcher(__name__)

WriteBack = Callable[[Sequence[BaseNode]], object]
"""Takes nodes that were encoded during a query, as copies that carry the encoding; `write_back_to` makes one for a store."""


class KalmRerank(RerankerComponent, BaseNodePostprocessor):
    """Reranks nodes, best first, with the encodings that they carry; what has none is encoded.

    Returns copies with the score P(yes), a float between 0 and 1, and without encodings.

    ```python
    query_engine = index.as_query_engine(similarity_top_k=50, node_postprocessors=[KalmRerank("pico", top_n=5)])
    ```
    """

    top_n: PositiveInt | None = 5
    """How many nodes to return at most; None returns all."""
    score_threshold: float | None = None
    """Nodes that score less are left out, before `top_n` is applied."""
    fusion: FusionMethod | None = None
    """Order by the retriever's judgement too: "z_score" adds the scores that nodes come with, "reciprocal_rank" the ranks in
    which they come. The score stays P(yes); what decides the order is returned as metadata `fused_score`, hidden from LLMs and
    embedding models."""
    fusion_weight: float | None = None
    """The reranker's share in a fusion, from 0 to 1."""
    instruction: str | None = None
    """What makes a passage relevant. Encodings do not depend on it."""
    system_instruction: str | None = None
    """The sentence that tells the model to judge."""
    max_query_tokens: PositiveInt | None = None
    """Longer queries are cut."""
    calibration: bool | dict[str, float] | None = None
    """Make scores probabilities: True takes what `kalm calibrate` saved in the checkpoint, or give temperature and bias."""
    keep_retrieval_score: bool = False
    """Keep the score that a node came with as metadata `retrieval_score`, hidden from LLMs and embedding models."""
    strip_encodings: bool = True
    """Return nodes without encodings, so that traces and responses stay small."""
    on_missing: Literal["encode", "error"] = "encode"
    """What happens to nodes without a sound encoding of their text."""
    write_back: WriteBack | None = Field(default=None, exclude=True)
    """Gets what had to be encoded, after scoring. Its errors are logged and never fail a query."""

    @field_validator("fusion_weight")
    @classmethod
    def _check_fusion_weight(cls, fusion_weight: float | None, others: ValidationInfo) -> float | None:
        # A method that is wrong itself is not among the others, and reported for its own part.
        if "fusion" in others.data:
            check_fusion(others.data["fusion"], fusion_weight)
        return fusion_weight

    @classmethod
    def class_name(cls) -> str:
        """Name in serialised form."""
        return "KalmRerank"

    def _postprocess_nodes(self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None) -> list[NodeWithScore]:
        if query_bundle is None:
            msg = "Missing query bundle in extra info."
            raise ValueError(msg)
        if not nodes:
            return []
        stripped = [node.model_copy(update={"node": strip(node.node, self.encoding_key)}) for node in nodes]
        top_n = len(nodes) if self.top_n is None else self.top_n
        dispatcher.event(ReRankStartEvent(query=query_bundle, nodes=stripped, top_n=top_n, model_name=self.model))
        payload: dict[str, Any] = {
            EventPayload.NODES: stripped,
            EventPayload.MODEL_NAME: self.model,
            EventPayload.QUERY_STR: query_bundle.query_str,
            EventPayload.TOP_K: top_n,
        }
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            ranked = self._rank(query_bundle.query_str, nodes)
            shown = [self._output(stripped[passage.index], passage) for passage in ranked]
            event.on_end(payload={EventPayload.NODES: shown})
        dispatcher.event(ReRankEndEvent(nodes=shown))
        return shown if self.strip_encodings else [self._output(nodes[passage.index], passage) for passage in ranked]

    def _rank(self, query: str, nodes: Sequence[NodeWithScore]) -> list[RankedPassage]:
        passages = [to_passage(node.node, self.encoding_key, self.metadata_mode) for node in nodes]
        if self.on_missing == "error":
            self._check_encoded(nodes, passages)
        ranked = self.reranker.rank(
            query,
            passages,
            self.top_n,
            self.score_threshold,
            self.instruction,
            first_stage_scores=self._first_stage_scores(nodes) if self.fusion == "z_score" else None,
            fusion=self.fusion,
            fusion_weight=self.fusion_weight,
        )
        if self.write_back is not None:
            self._write(self.write_back, nodes, passages)
        return ranked

    def _first_stage_scores(self, nodes: Sequence[NodeWithScore]) -> list[float]:
        unscored = [node.node_id for node in nodes if node.score is None]
        if unscored:
            msg = (
                f"fusion='z_score' needs nodes with a score, but {len(unscored)} of {len(nodes)} have none, the first being "
                f"{unscored[0]}; use a retriever that gives scores, or fusion='reciprocal_rank'"
            )
            raise SettingsError(msg)
        return [node.score for node in nodes if node.score is not None]

    def _check_encoded(self, nodes: Sequence[NodeWithScore], passages: Sequence[Passage]) -> None:
        missing = self.reranker.find_unencoded(passages)
        if missing:
            msg = (
                f"on_missing='error' needs nodes with a sound encoding of their text, but {len(missing)} of {len(nodes)} have "
                f"none, the first being {nodes[missing[0]].node_id}; run backfill, or set on_missing='encode'"
            )
            raise EncodingError(msg)

    def _write(self, write_back: WriteBack, nodes: Sequence[NodeWithScore], passages: Sequence[Passage]) -> None:
        try:
            missing = {nodes[i].node_id: i for i in self.reranker.find_unencoded(passages)}.values()
            if missing:
                encoded = self._encode([passages[i].text for i in missing])
                write_back([attach(nodes[i].node, m, self.encoding_key) for i, m in zip(missing, encoded, strict=True)])
        except Exception:
            logger.exception("encodings made during a query could not be written back; they will be made again")

    def _output(self, node: NodeWithScore, ranked: RankedPassage) -> NodeWithScore:
        update = {RETRIEVAL_SCORE_KEY: node.score} if self.keep_retrieval_score else {}
        if ranked.fused is not None:
            update[FUSED_SCORE_KEY] = ranked.fused
        return node.model_copy(update={"node": with_hidden_metadata(node.node, update), "score": float(ranked.score)})
