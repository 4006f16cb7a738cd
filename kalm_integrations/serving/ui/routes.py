"""The page's files, and the two questions that it asks: what there is to rank with, and a ranking with all that is known."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse

from kalm_integrations import __version__
from kalm_integrations.core.types import ENCODING_KEY, Passage, RankedPassage, Ranking, Status
from kalm_integrations.remote.protocol import SentPassage, SentSpan
from kalm_integrations.serving.formats import Answer, Body, Instruction, Query, printable
from kalm_integrations.serving.service import Service, note
from kalm_integrations.serving.ui.collection import Collection
from kalm_integrations.serving.ui.variants import Variants

PAGE_PATH = "/ui/"
FACTS_PATH = "/ui/facts"
RANK_PATH = "/ui/rank"

MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

FILES = {
    PAGE_PATH + ("" if path.name == "index.html" else path.name): path
    for path in sorted(Path(__file__).with_name("static").iterdir())
    if path.suffix in MEDIA_TYPES
}
"""The page's files by their path in the service."""

OPEN_PATHS = frozenset({"/", PAGE_PATH.rstrip("/"), *FILES})
"""What a browser fetches before it can send a key: the page without any passage."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Nothing from elsewhere, nothing inline, and no text that becomes markup: passages are untrusted."""

HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


class Loaded(Answer):
    """The passages that the service was started with."""

    name: str
    n_passages: int
    limit: int
    first_stage: str | None


class Facts(Answer):
    """What there is to rank with."""

    model: str
    version: str
    max_documents: int
    max_body_bytes: int
    ratio: int | None
    codec: str | None
    ratios: list[int]
    codecs: list[str]
    collection: Loaded | None


class RankBody(Body):
    """A question to the collection, or to passages that come with it."""

    query: Query
    passages: list[SentPassage] | None = None
    """None asks the collection."""
    instruction: Instruction = None
    ratio: int | None = None
    codec: str | None = None
    spans: int | None = Field(default=None, ge=1)
    """How many of the best passages are wanted with the scores of their sentences."""


class Shown(Answer):
    """A passage with what is known of it; the list of them is in the first stage's order."""

    name: str | None
    """In the collection."""
    text: str
    rank: int
    """From 1."""
    score: float
    margin: float
    status: Status
    n_bytes: int
    """Of the string to store with it."""
    n_text_bytes: int
    spans: list[SentSpan] | None
    """In the text's order."""
    window: tuple[int, int] | None
    """Where the best window lies in the text, in code points, of a passage that has several."""


class RankAnswer(Answer):
    """The passages before and after."""

    passages: list[Shown]
    first_stage: str | None
    ratio: int | None
    codec: str | None
    seconds: dict[str, float] = Field(description="Of the encoder, of the decoder, and of the whole answer.")


def check_origin(key: str | None) -> Any:
    """Return what refuses requests that another site's page has a browser send.

    A name in `Host` that is not this machine's own may be a site's that leads to this address (DNS rebinding): where no key
    is asked for, addresses in numbers and localhost pass only.
    """

    async def check(request: Request) -> None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise HTTPException(403, "Origin must be this page's own address, but is another; open the page itself")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if key is None and not _is_own(name.strip("[]").lower()):
            msg = (
                "Host must be localhost or an address in numbers where no key is asked for, but is another name; open the "
                "page by such an address, or start it with --api-key-env"
            )
            raise HTTPException(403, msg)

    return check


def _is_own(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost"
    return True


def page_routes() -> APIRouter:
    """Return the page's files, which need no key."""
    router = APIRouter(include_in_schema=False)
    for path, file in FILES.items():
        router.add_api_route(path, _file(file), methods=["GET"])

    @router.get("/")
    async def start() -> Response:
        return RedirectResponse(PAGE_PATH.removeprefix("/"))

    return router


def _file(file: Path) -> Any:
    content, media_type = file.read_bytes(), MEDIA_TYPES[file.suffix]

    async def send() -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    return send


def routes(service: Service, variants: Variants, collection: Collection | None, key: str | None) -> APIRouter:
    """Return the endpoints that the page asks."""
    router = APIRouter(include_in_schema=False, dependencies=[Depends(check_origin(key))])

    @router.get(FACTS_PATH)
    async def facts() -> Facts:
        """Say what there is to rank with; 503 until the model is loaded."""
        settings = service.settings
        ratios, codecs = variants.choices()
        ratio, codec = variants.own_setting() or (None, None)
        loaded = None
        if collection is not None:
            loaded = Loaded(
                name=printable(collection.name),
                n_passages=len(collection),
                limit=collection.limit,
                first_stage=collection.first_stage,
            )
        return Facts(
            model=settings.names[0],
            version=__version__,
            max_documents=settings.max_documents,
            max_body_bytes=settings.max_body_bytes,
            ratio=ratio,
            codec=codec,
            ratios=ratios,
            codecs=codecs,
            collection=loaded,
        )

    @router.post(RANK_PATH)
    async def rank(body: RankBody, request: Request, response: Response) -> RankAnswer:
        """Rank the collection's passages, or those that are sent."""
        started = time.perf_counter()
        response.headers["cache-control"] = "no-store"
        if body.passages is not None:
            names: list[str] = []
            passages = [Passage(passage.text, passage.encoding) for passage in body.passages]
            first_stage = None
        elif collection is not None:
            names, passages = await asyncio.to_thread(collection.choose, body.query)
            first_stage = collection.first_stage
        else:
            raise HTTPException(422, "passages must be given, for none were loaded when the page was started, but are missing")
        note(request, n_documents=len(passages))
        service.check_count(len(passages))
        own = variants.own_setting()
        setting = own and (body.ratio or own[0], body.codec or own[1])
        reranker = service.reranker
        if setting != own and setting is not None:
            ratios, codecs = variants.choices()
            if setting[0] not in ratios or setting[1] not in codecs:
                raise HTTPException(422, f"ratio must be one of {ratios} and codec one of {codecs}, but got {setting}")
            reranker = await variants.get(*setting)
            # Encodings that came with the passages have another ratio or codec.
            passages = [Passage(passage.text) for passage in passages]
        before = reranker.stats
        ranking = await service.rank(request, body.query, passages, body.instruction, reranker=reranker, spans=body.spans)
        after = reranker.stats
        shown = await asyncio.to_thread(_shown, names, passages, ranking)
        ratio, codec = setting or (None, None)
        return RankAnswer(
            passages=shown,
            first_stage=first_stage,
            ratio=ratio,
            codec=codec,
            seconds={
                "encode": after.encode_seconds - before.encode_seconds,
                "score": after.score_seconds - before.score_seconds,
                "total": time.perf_counter() - started,
            },
        )

    return router


def _shown(names: Sequence[str], passages: Sequence[Passage], ranking: Ranking) -> list[Shown]:
    """Return the passages in their first order."""
    made = ranking.to_metadata(ranking.reading.not_stored)
    shown = [
        Shown(
            name=printable(names[ranked.index]) if names else None,
            text=printable(passages[ranked.index].text),
            rank=rank,
            score=ranked.score,
            margin=ranked.margin,
            status=ranking.reading[ranked.index],
            n_bytes=len(made[ranked.index][ENCODING_KEY] if ranked.index in made else passages[ranked.index].encoding or ""),
            n_text_bytes=len(passages[ranked.index].text.encode("utf-8", "replace")),
            spans=_sentences(ranked),
            window=ranked.window,
        )
        for rank, ranked in enumerate(ranking, 1)
    ]
    return [one for _, one in sorted(zip((ranked.index for ranked in ranking), shown, strict=True), key=lambda pair: pair[0])]


def _sentences(ranked: RankedPassage) -> list[SentSpan] | None:
    """Return the sentences of a passage in the order of its text, if they were asked for."""
    if ranked.spans is None:
        return None
    return [SentSpan(**span.to_dict()) for span in sorted(ranked.spans, key=lambda span: span.start)]
