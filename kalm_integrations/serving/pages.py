"""What says how the service is, which models it has, and how it is asked."""

from __future__ import annotations

import html
import json
import time
from typing import Any, Literal

from fastapi import APIRouter, FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import HTMLResponse

from kalm_integrations import __version__
from kalm_integrations.serving.errors import documented
from kalm_integrations.serving.formats import Answer
from kalm_integrations.serving.service import Service


class State(Answer):
    """How the service is."""

    status: Literal["ok", "ready"]


class ServedModel(Answer):
    """A name of the model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "kalm-integrations"


class ServedModels(Answer):
    """The names that requests may give."""

    object: Literal["list"] = "list"
    data: list[ServedModel]


def open_routes(service: Service) -> APIRouter:
    """Return the endpoints that need no key."""
    router = APIRouter(tags=["Service"])

    @router.get("/health", summary="Whether the process answers")
    async def health() -> State:
        """Say that the process answers; no key is needed."""
        return State(status="ok")

    @router.get("/ready", summary="Whether the model is loaded", responses=documented(503))
    async def ready() -> State:
        """Say that the model is loaded; 503 until it is. No key is needed."""
        assert service.reranker  # raises until it is there
        return State(status="ready")

    return router


def routes(service: Service) -> APIRouter:
    """Return the endpoints that need the key, if there is one."""
    router = APIRouter(tags=["Service"])
    started = int(time.time())

    @router.get("/v1/models", summary="What the model may be called, as OpenAI says it", responses=documented(401))
    async def models() -> ServedModels:
        """List the names that requests may give."""
        return ServedModels(data=[ServedModel(id=name, created=started) for name in service.settings.names])

    @router.get(
        "/metrics",
        summary="Numbers for Prometheus",
        response_class=Response,
        responses={200: {"content": {CONTENT_TYPE_LATEST: {"schema": {"type": "string"}}}}, **documented(401)},
    )
    async def metrics() -> Response:
        """Return the numbers."""
        await service.measure()
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return router


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color-scheme: light dark }
h2 { margin-top: 2.5rem; font-size: 1.1rem } code, pre { font: 14px/1.45 ui-monospace, monospace }
pre { overflow-x: auto; padding: .8rem; border: 1px solid #8886; border-radius: .3rem }
"""


def render_docs(api: dict[str, Any]) -> str:
    """Return the OpenAPI description as a page that loads nothing from anywhere."""
    parts = [f"<h1>kalm-integrations {__version__}</h1><p>The whole description: <a href='openapi.json'>openapi.json</a></p>"]
    for path, operations in api["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code> {html.escape(operation['summary'])}</h2>")
            parts.append(f"<p>{html.escape(operation.get('description', ''))}</p>")
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            parts += [f"<pre>{html.escape(json.dumps(example, indent=2))}</pre>" for example in _examples(content, api)]
    return f"<!doctype html><html lang=en><meta charset=utf-8><title>API</title><style>{STYLE}</style>{''.join(parts)}</html>"


def _examples(content: dict[str, Any], api: dict[str, Any]) -> list[Any]:
    """Return the examples of a body, its own or those of what it refers to."""
    if "example" in content:
        return [content["example"]]
    schema = content.get("schema", {})
    references = [schema, *schema.get("oneOf", [])]
    names = [reference["$ref"].rpartition("/")[2] for reference in references if "$ref" in reference]
    return [example for name in names for example in api["components"]["schemas"][name].get("examples", [])]


def add_docs(app: FastAPI) -> None:
    """Have an application show how it is asked."""

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(render_docs(app.openapi()))
