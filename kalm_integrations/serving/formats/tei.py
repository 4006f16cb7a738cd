"""`/rerank` of Hugging Face's Text Embeddings Inference; bodies with `documents` are Jina's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Discriminator, Field, JsonValue, Tag

from kalm_integrations import __version__
from kalm_integrations.core.types import RankedPassage
from kalm_integrations.serving.errors import documented
from kalm_integrations.serving.formats import Answer, Body, Instruction, Query, printable
from kalm_integrations.serving.formats.jina import JinaAnswer, JinaRequest, answer
from kalm_integrations.serving.service import Question, Service

EXAMPLE: dict[str, JsonValue] = {
    "query": "What do otters eat?",
    "texts": ["The Rhine rises in the Swiss Alps.", "Otters live on fish and crabs."],
}


class TeiRequest(Body):
    """A query and texts, all of which are scored."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    query: Query
    texts: list[str] = Field(description="None at all give an empty list.")
    raw_scores: bool = Field(default=False, description="Margins, logit(yes) - logit(no), instead of P(yes).")
    return_text: bool = Field(default=False, description="Whether results hold the texts.")
    truncate: bool | None = Field(default=None, description="Texts are read up to /info's max_input_length in any case.")
    truncation_direction: Literal["Right", "right"] | None = Field(
        default=None, description="The model reads texts from their start."
    )
    instruction: Instruction = None


class TeiResult(Answer):
    """A text's place in the list that was sent, and its score."""

    index: int
    score: float
    text: str | None = None


class TeiInfo(Answer):
    """What is served."""

    model_id: str
    model_type: dict[str, Any] = Field(
        default_factory=lambda: {"reranker": {"id2label": {"0": "relevance"}, "label2id": {"relevance": 0}}}
    )
    max_client_batch_size: int
    max_input_length: int | None = Field(
        description="Tokens of a text that are read, in windows if need be; known once the model is loaded."
    )
    auto_truncate: bool = True
    version: str = __version__


def _kind(body: Any) -> str:
    return "documents_body" if isinstance(body, Mapping) and "documents" in body and "texts" not in body else "texts_body"


EitherRequest = Annotated[
    Annotated[TeiRequest, Tag("texts_body")] | Annotated[JinaRequest, Tag("documents_body")], Discriminator(_kind)
]


def routes(service: Service) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter()

    @router.post(
        "/rerank",
        tags=["Rerank"],
        summary="Rerank, in the format of TEI",
        response_model_exclude_none=True,
        responses=documented(),
    )
    async def rerank(body: EitherRequest, request: Request) -> list[TeiResult] | JinaAnswer:
        """Score all texts for a query, best first; a body with `documents` is answered as /v1/rerank does."""
        if isinstance(body, JinaRequest):
            return await answer(service, request, body)
        ranking = await service.answer(request, Question(body.query, body.texts, instruction=body.instruction))

        def result(passage: RankedPassage) -> TeiResult:
            text = printable(body.texts[passage.index]) if body.return_text else None
            return TeiResult(index=passage.index, score=passage.margin if body.raw_scores else passage.score, text=text)

        return [result(passage) for passage in ranking]

    @router.get("/info", tags=["Service"], summary="What is served, as TEI says it", responses=documented(401))
    async def info() -> TeiInfo:
        """Say what is served."""
        return TeiInfo(
            model_id=service.settings.names[0],
            max_client_batch_size=service.settings.max_documents,
            max_input_length=service.max_tokens_read,
        )

    return router
