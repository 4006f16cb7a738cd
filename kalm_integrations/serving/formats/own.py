"""What our own clients ask for: scores with encodings that they hold, and encodings to store. See `remote.protocol`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from kalm_integrations.core.types import AnyPassage, Passage
from kalm_integrations.remote.protocol import (
    ENCODINGS_PATH,
    FACTS_PATH,
    SCORE_PATH,
    EncodingsAnswer,
    EncodingsRequest,
    ScoreAnswer,
    ScoreRequest,
    SentSpan,
    ServiceFacts,
)
from kalm_integrations.serving.errors import documented
from kalm_integrations.serving.formats.stream import EncodingStream
from kalm_integrations.serving.guard import NDJSON, digest, is_stream
from kalm_integrations.serving.service import Service, note

ENCODINGS_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": EncodingsRequest.model_json_schema(),
                "example": {"texts": ["Otters live on fish and crabs."]},
            },
            NDJSON: {"schema": {"type": "string", "description": "Such an object a line."}},
        },
    },
    "responses": {
        "200": {
            "description": "For each text, in order, what to store with it; for a stream, such an answer a line.",
            "content": {
                "application/json": {"schema": EncodingsAnswer.model_json_schema()},
                NDJSON: {"schema": {"type": "string"}},
            },
        }
    },
}


def _origin(client: str | None, held: str | None) -> tuple[str, bytes] | None:
    """Return where an encoding comes from: it serves nobody but who sent it, for passages that it came with."""
    return None if client is None or held is None else ("client", digest(f"{client} {held}"))


def routes(service: Service) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter(tags=["Encodings"])

    @router.get(FACTS_PATH, summary="What the service's encodings are", responses=documented(401, 503))
    async def facts() -> ServiceFacts:
        """Say which encodings the service makes and reads."""
        return service.facts()

    @router.post(SCORE_PATH, summary="Score passages in the order in which they come", responses=documented())
    async def score(body: ScoreRequest, request: Request) -> ScoreAnswer:
        """Score passages, or say which of the encodings that are held are wanted instead."""
        note(request, n_documents=len(body.passages))
        service.check_count(len(body.passages))
        passages: list[AnyPassage] = [
            Passage(passage.text, passage.encoding, _origin(body.client, passage.held)) for passage in body.passages
        ]
        reranker = service.reranker
        reading = await reranker.aread(passages)
        fingerprint, windows_fingerprint = reranker.fingerprint, service.windows_fingerprint
        wanted = [
            index
            for index, (key, passage) in enumerate(zip(reading.keys, body.passages, strict=True))
            if passage.held is not None and passage.encoding is None and key not in reading.encodings
        ]
        if wanted:
            note(request, n_wanted=len(wanted))
            return ScoreAnswer(fingerprint=fingerprint, windows_fingerprint=windows_fingerprint, wanted=wanted)
        spans = len(reading) if body.spans and reading else None
        ranking = await service.rank(request, body.query, reading, body.instruction, spans=spans)
        ordered = sorted(ranking, key=lambda passage: passage.index)
        windows = [passage.window for passage in ordered]
        return ScoreAnswer(
            fingerprint=fingerprint,
            windows_fingerprint=windows_fingerprint,
            margins=[passage.margin for passage in ordered],
            scores=[passage.score for passage in ordered],
            statuses=list(reading.statuses),
            spans=[[SentSpan(**span.to_dict()) for span in passage.spans] for passage in ordered if passage.spans is not None],
            windows=windows if any(windows) else [],
        )

    @router.post(
        ENCODINGS_PATH,
        summary="Encode passages, and return what to store with them",
        openapi_extra=ENCODINGS_BODY,
        responses=documented(),
        response_model=None,
    )
    async def encodings(request: Request) -> Response:
        """Encode passages; with a store they are put there too. A body of lines is answered line by line."""
        if is_stream(request.scope):
            return EncodingStream(service, request)
        try:
            body = EncodingsRequest.model_validate_json(await request.body())
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from error
        note(request, n_documents=len(body.texts))
        service.check_count(len(body.texts))
        name = service.name(body.model)
        made = await service.encode(request, body.texts, service.settings.timeout)
        answer = EncodingsAnswer(model=name, fingerprint=service.reranker.fingerprint, encodings=made)
        return Response(answer.model_dump_json(), media_type="application/json")

    return router
