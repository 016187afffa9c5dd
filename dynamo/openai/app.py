"""The OpenAI-compatible server over a `Backend`: its routes, its errors, and the layers around them."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dynamo import __version__
from dynamo.errors import DynamoError, ModelNotFoundError, RequestError
from dynamo.http import errors
from dynamo.http.access_log import log_rejected
from dynamo.http.middleware import ApiKeys, RequestIds
from dynamo.http.prometheus_text import http_sd, load, merge
from dynamo.llm.protocol import ServedModel
from dynamo.openai import endpoints
from dynamo.openai.backend import Backend

if TYPE_CHECKING:
    from dynamo.rpc.metrics import ProcessMetrics

MAX_BODY_BYTES = 64 << 20
Targets = Callable[[], Awaitable[Collection[str]]]
PAGE = Path(__file__).with_name("page.html")


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, media_type="application/json")


def _model(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "dynamo",
        "root": model.root,
        "parent": None,
        "max_model_len": model.context_length,
    }


def _add_pages(
    app: FastAPI,
    backend: Backend,
    api: endpoints.Api,
    processes: ProcessMetrics | None,
    targets: Targets | None,
    fault: Callable[[], str],
) -> None:
    """The routes that only tell something. HEAD works wherever GET does."""

    async def models() -> Response:
        return _json({"object": "list", "data": [_model(m) for m in backend.models()]})

    async def model(name: str) -> Response:
        for found in backend.models():
            if found.name == name:
                return _json(_model(found))
        raise ModelNotFoundError(f"The model `{name}` does not exist.", param="model")

    async def health() -> Response:
        names, reason = [m.name for m in backend.models()], fault()
        status = "unavailable" if reason else "healthy" if names else "starting"
        state = {"status": status, "models": names, "instances": backend.endpoints()}
        return _json({**state, "reason": reason} if reason else state, 200 if status == "healthy" else 503)

    async def live() -> Response:
        return _json({"status": "live"})

    async def metrics() -> Response:
        body, kind = api.metrics.exposition()
        if processes is not None:
            others = await processes.gather()
            own = processes.text()
            body = merge([body, own, *others, load([own, *others])])
        return Response(body, headers={"content-type": kind})

    async def metrics_targets() -> Response:
        return Response(http_sd(await targets() if targets is not None else ()), media_type="application/json")

    page = PAGE.read_bytes()

    async def index() -> Response:
        return Response(page, media_type="text/html")

    for path, answer, summary in (
        ("/v1/models", models, "Models that can answer now"),
        ("/v1/models/{name:path}", model, "One model"),
        ("/health", health, "200 when a model can answer, else 503"),
        ("/live", live, "200 while the process runs"),
        ("/metrics", metrics, "Prometheus metrics"),
        ("/metrics/targets", metrics_targets, "Prometheus' list of the hosts to scrape"),
        ("/", index, "A page to try the models"),
    ):
        app.add_api_route(path, answer, methods=["GET"], summary=summary)
        app.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False)


def _add_errors(app: FastAPI) -> None:
    """Every failure is OpenAI's envelope."""

    async def failed(request: Request, error: Exception) -> Response:
        if isinstance(error, DynamoError):  # others are raised again, for uvicorn to log them
            log_rejected(f"{request.method} {request.url.path}", error)
        extra = {key.decode(): value.decode() for key, value in errors.headers(error)}
        return _json(errors.envelope(error), errors.status_of(error), extra)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        method, path, status = request.method, request.url.path, error.status_code
        headers = dict(error.headers or {})
        if status == 405 and method == "OPTIONS":
            return Response(status_code=204, headers=headers)
        text, code = str(error.detail), None
        if status == 404:
            text, code = f"Unknown request URL: {method} {path}. See /docs.", "unknown_url"
        elif status == 405:
            text, code = f"{method} is not allowed on {path}; use {headers.get('Allow')}.", "method_not_allowed"
        level = logging.DEBUG if status == 404 else None
        log_rejected(f"{method} {path}", RequestError(text), status=status, level=level)
        body = {"message": text, "type": "invalid_request_error", "param": None, "code": code}
        return _json({"error": body}, status, headers)

    app.add_exception_handler(DynamoError, failed)
    app.add_exception_handler(Exception, failed)
    app.add_exception_handler(HTTPException, refused)


def create_app(
    backend: Backend,
    *,
    max_body_bytes: int = MAX_BODY_BYTES,
    timeout_s: float | None = None,
    cors_origins: Collection[str] | None = None,
    api_keys: Collection[str] | None = None,
    processes: ProcessMetrics | None = None,
    targets: Targets | None = None,
    fault: Callable[[], str] = str,
) -> ASGIApp:
    """The ASGI application.

    `timeout_s` is each request's deadline; None: no limit. `cors_origins` are sites whose pages may call this server,
    "*" for all. With `api_keys`, `/v1` answers only to those; probes, metrics and documentation stay open. `processes`
    are those that /metrics shows besides the server itself; `targets` gives the addresses for /metrics/targets.
    `fault` says why nothing can be answered now, though models are there; empty while all is well: /health tells.
    """
    app = FastAPI(title="dynamo", version=__version__, docs_url="/docs", redoc_url=None, redirect_slashes=False)
    api = endpoints.Api(backend, max_body_bytes, timeout_s)
    if processes is not None:
        processes.share(api.metrics.registry)
    _add_pages(app, backend, api, processes, targets, fault)
    _add_errors(app)
    generating: dict[str, endpoints.GeneratingRoute] = {
        "/v1/chat/completions": endpoints.ChatCompletions(api),
        "/v1/completions": endpoints.Completions(api),
    }
    for path, route in generating.items():
        app.router.routes.append(Route(path, route, methods=["POST"]))  # for other methods and trailing slashes

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for path, route in generating.items():
                content = {"application/json": {"schema": route.accepts.model_json_schema()}}
                answers = {"200": {"description": "JSON, or server-sent events when `stream` is true"}}
                schema["paths"][path] = {"post": {"requestBody": {"content": content}, "responses": answers}}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]

    async def shortcut(scope: Scope, receive: Receive, send: Send) -> None:
        """Generating routes without FastAPI's layers, which cost 25 µs a request and, with its validation, 250."""
        direct = generating.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        await (direct or app)(scope, receive, send)

    around: ASGIApp = shortcut
    if api_keys:
        around = ApiKeys(around, api_keys)
    if cors_origins:
        around = CORSMiddleware(
            around,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    return RequestIds(around)
