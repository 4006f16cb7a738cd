"""The application: endpoints, what guards them, and a reranker that is opened while it answers already."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI
from fastapi.middleware import Middleware
from fastapi.security import HTTPBearer

from kalm_integrations import __version__
from kalm_integrations.remote.protocol import ENCODINGS_PATH, FACTS_PATH, SCORE_PATH
from kalm_integrations.serving import pages
from kalm_integrations.serving.access import AccessLog
from kalm_integrations.serving.errors import answer_errors
from kalm_integrations.serving.formats import cohere, jina, own, tei
from kalm_integrations.serving.guard import OPEN_PATHS, Guard
from kalm_integrations.serving.service import OpenReranker, Service, open_kalm
from kalm_integrations.serving.settings import ServiceSettings
from kalm_integrations.serving.ui import routes as ui
from kalm_integrations.serving.ui.collection import Page
from kalm_integrations.serving.ui.variants import Variants

logger = logging.getLogger(__name__)

DESCRIPTION = """Reranking with KaLM-Reranker-V1, in the formats of Cohere, Jina and TEI. Each passage is encoded once: the
service finds encodings again by the passage's text. `instruction` may be added to every request."""


def log_failure(error: Exception) -> None:
    """Say why a model cannot be opened."""
    logger.critical("the model cannot be opened: %s", error, exc_info=error)


def create_app(
    settings: ServiceSettings,
    open_reranker: OpenReranker = open_kalm,
    *,
    on_failure: Callable[[Exception], object] = log_failure,
    page: Page | None = None,
) -> FastAPI:
    """Return the application of a service.

    Args:
        settings: what to serve, and how.
        open_reranker: opens the reranker; it is called on a thread, after the application has started.
        on_failure: is told why the reranker cannot be opened; the application goes on to answer 503.
        page: if given, the page of `kalm ui` is there.

    Raises:
        SettingsError: the environment variable that is to hold the key does not.
    """
    key = settings.read_key()
    service = Service(settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.open(open_reranker, on_failure)
        feeding = asyncio.ensure_future(service.feed_regularly())
        yield
        feeding.cancel()
        await service.close()

    # The guard has looked at the key: this is for the description.
    security = [] if key is None else [Depends(HTTPBearer(auto_error=False))]
    routers = [kind.routes(service) for kind in (cohere, jina, tei, own, pages)]
    endpoints = {"/v2/rerank", "/v1/rerank", "/rerank", "/info", FACTS_PATH, SCORE_PATH, ENCODINGS_PATH, "/v1/models"}
    open_paths = OPEN_PATHS | ui.OPEN_PATHS if page is not None else OPEN_PATHS
    endpoints |= {ui.PAGE_PATH, ui.FACTS_PATH, ui.RANK_PATH} if page is not None else set()
    app = FastAPI(
        title="kalm-integrations",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        middleware=[
            Middleware(AccessLog, service=service, endpoints=endpoints | {"/health", "/ready", "/metrics", "/docs"}),
            Middleware(
                Guard,
                key=key,
                max_body_bytes=settings.max_body_bytes,
                body_seconds=settings.body_seconds,
                open_paths=open_paths,
            ),
        ],
    )
    app.include_router(pages.open_routes(service))
    for router in routers:
        app.include_router(router, dependencies=security)
    if page is not None:
        app.include_router(ui.page_routes())
        app.include_router(ui.routes(service, Variants(service, open_reranker), page.collection, key))
    answer_errors(app)
    pages.add_docs(app)
    return app
