"""Jina's `/v1/rerank`, which vLLM's clients and Cohere's first version speak too."""

from __future__ import annotations

import uuid

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field

from kalm_integrations.core.types import RankedPassage
from kalm_integrations.serving.errors import documented
from kalm_integrations.serving.formats import Answer, printable
from kalm_integrations.serving.formats.cohere import CohereRequest, CohereResult
from kalm_integrations.serving.service import Service


class JinaRequest(CohereRequest):
    """A query, documents, how many are wanted, and whether their texts are."""

    return_documents: bool = Field(default=False, description="Whether results hold the documents' texts.")


class JinaDocument(Answer):
    """A document's text."""

    text: str


class JinaResult(CohereResult):
    """A document's place in the list that was sent, and its P(yes)."""

    document: JinaDocument | None = None


class JinaUsage(Answer):
    """What clients of Jina read; always 0, because tokens that were encoded long ago are not counted again."""

    total_tokens: int = 0


class JinaAnswer(Answer):
    """The documents, best first."""

    model_config = ConfigDict(protected_namespaces=())

    id: str
    model: str
    usage: JinaUsage = JinaUsage()
    results: list[JinaResult]


async def answer(service: Service, request: Request, body: JinaRequest) -> JinaAnswer:
    """Answer a request in this format."""
    ranking = await service.answer(request, body.question())

    def result(passage: RankedPassage) -> JinaResult:
        text = printable(body.documents[passage.index]) if body.return_documents else None
        document = None if text is None else JinaDocument(text=text)
        spans = body.spans_of(passage)
        return JinaResult(index=passage.index, relevance_score=passage.score, relevant_spans=spans, document=document)

    return JinaAnswer(id=str(uuid.uuid4()), model=service.name(body.model), results=[result(passage) for passage in ranking])


def routes(service: Service) -> APIRouter:
    """Return the endpoint."""
    router = APIRouter(tags=["Rerank"])

    @router.post("/v1/rerank", summary="Rerank, in Jina's format", response_model_exclude_none=True, responses=documented())
    async def rerank(body: JinaRequest, request: Request) -> JinaAnswer:
        """Order documents by their relevance to a query; vLLM's clients and Cohere's first version ask in this way too."""
        return await answer(service, request, body)

    return router
