"""Cohere's `/v2/rerank`."""

from __future__ import annotations

import uuid
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field, JsonValue

from kalm_integrations.core.types import RankedPassage
from kalm_integrations.serving.errors import documented
from kalm_integrations.serving.formats import Answer, Body, Documents, Instruction, MaxTokens, Model, Query, TopN
from kalm_integrations.serving.service import Question, Service

EXAMPLE: dict[str, JsonValue] = {
    "model": "pico",
    "query": "What do otters eat?",
    "documents": ["The Rhine rises in the Swiss Alps.", "Otters live on fish and crabs."],
    "top_n": 1,
}


DEFAULT_THRESHOLD = 0.1
"""Cohere's."""


class RelevantSpans(Body):
    """Whether results hold the spans of their documents that are relevant, and which."""

    mode: Literal["enabled", "disabled"]
    threshold: float | None = Field(
        default=None, ge=0, le=1, description=f"Spans must score higher than this; none: {DEFAULT_THRESHOLD}."
    )
    max_spans: int | None = Field(default=None, ge=1, description="How many of a document at most, the best; none: all.")


class CohereRequest(Body):
    """A query, documents, and how many are wanted."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    query: Query
    documents: Documents
    model: Model = None
    top_n: TopN = None
    max_tokens_per_doc: MaxTokens = None
    instruction: Instruction = None
    relevant_spans: RelevantSpans | None = None

    def question(self) -> Question:
        """Return what is asked for."""
        return Question(
            self.query,
            self.documents,
            self.model,
            self.top_n,
            self.instruction,
            self.max_tokens_per_doc,
            spans=self.relevant_spans is not None and self.relevant_spans.mode == "enabled",
        )

    def spans_of(self, passage: RankedPassage) -> list[CohereSpan] | None:
        """Return the spans of a document that the request wants, best first; None if there are none."""
        wanted = self.relevant_spans
        if wanted is None or passage.spans is None:
            return None
        threshold = DEFAULT_THRESHOLD if wanted.threshold is None else wanted.threshold
        spans = [CohereSpan(**span.to_dict()) for span in passage.spans if span.score > threshold]
        return spans[: wanted.max_spans] or None


class CohereSpan(Answer):
    """A part of a document that was sent, in code points, and its P(yes)."""

    start: int
    end: int
    score: float


class CohereResult(Answer):
    """A document's place in the list that was sent, and its P(yes)."""

    index: int
    relevance_score: float
    relevant_spans: list[CohereSpan] | None = Field(default=None, description="If enabled and found, best first.")


class CohereAnswer(Answer):
    """The documents, best first."""

    id: str
    results: list[CohereResult]
    meta: dict[str, Any] = Field(default_factory=lambda: {"api_version": {"version": "2"}})


def routes(service: Service) -> APIRouter:
    """Return the endpoint."""
    router = APIRouter(tags=["Rerank"])

    @router.post("/v2/rerank", summary="Rerank, in Cohere's format", response_model_exclude_none=True, responses=documented())
    async def rerank(body: CohereRequest, request: Request) -> CohereAnswer:
        """Order documents by their relevance to a query."""
        ranking = await service.answer(request, body.question())
        results = [
            CohereResult(index=passage.index, relevance_score=passage.score, relevant_spans=body.spans_of(passage))
            for passage in ranking
        ]
        return CohereAnswer(id=str(uuid.uuid4()), results=results)

    return router
