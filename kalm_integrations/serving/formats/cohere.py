"""Cohere's `/v2/rerank`."""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field, JsonValue

from kalm_integrations.serving.errors import documented
from kalm_integrations.serving.formats import Answer, Body, Documents, Instruction, MaxTokens, Model, Query, TopN
from kalm_integrations.serving.service import Question, Service

EXAMPLE: dict[str, JsonValue] = {
    "model": "pico",
    "query": "What do otters eat?",
    "documents": ["The Rhine rises in the Swiss Alps.", "Otters live on fish and crabs."],
    "top_n": 1,
}


class CohereRequest(Body):
    """A query, documents, and how many are wanted."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    query: Query
    documents: Documents
    model: Model = None
    top_n: TopN = None
    max_tokens_per_doc: MaxTokens = None
    instruction: Instruction = None


class CohereResult(Answer):
    """A document's place in the list that was sent, and its P(yes)."""

    index: int
    relevance_score: float


class CohereAnswer(Answer):
    """The documents, best first."""

    id: str
    results: list[CohereResult]
    meta: dict[str, Any] = Field(default_factory=lambda: {"api_version": {"version": "2"}})


def routes(service: Service) -> APIRouter:
    """Return the endpoint."""
    router = APIRouter(tags=["Rerank"])

    @router.post("/v2/rerank", summary="Rerank, in Cohere's format", responses=documented())
    async def rerank(body: CohereRequest, request: Request) -> CohereAnswer:
        """Order documents by their relevance to a query."""
        ranking = await service.answer(
            request,
            Question(body.query, body.documents, body.model, body.top_n, body.instruction, body.max_tokens_per_doc),
        )
        results = [CohereResult(index=passage.index, relevance_score=passage.score) for passage in ranking]
        return CohereAnswer(id=str(uuid.uuid4()), results=results)

    return router
