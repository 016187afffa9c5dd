"""The OpenAI-compatible ASGI application over a `Backend`: its routes, its errors, and the layers around them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dynamo import __version__
from dynamo.http.error_handlers import add_error_handlers, http_exception
from dynamo.http.middleware import ApiKeys, RequestIds
from dynamo.openai.backend import Backend, Forwarder
from dynamo.openai.endpoints import ChatCompletions, Completions, GeneratingRoute, RouteContext
from dynamo.openai.info_routes import Targets, add_info_routes

if TYPE_CHECKING:
    from dynamo.rpc.metrics import ProcessMetrics

MAX_BODY_BYTES = 64 << 20


def create_app(
    backend: Backend | Forwarder,
    *,
    max_body_bytes: int = MAX_BODY_BYTES,
    timeout_s: float | None = None,
    cors_origins: Collection[str] | None = None,
    api_keys: Collection[str] | None = None,
    processes: ProcessMetrics | None = None,
    targets: Targets | None = None,
    unavailable_reason: Callable[[], str] = str,
    missing: Callable[[str], str] | None = None,
) -> ASGIApp:
    """Return the ASGI application.

    Args:
        backend: generates the responses.
        max_body_bytes: larger request bodies are refused with 413.
        timeout_s: each request's deadline; None: no limit.
        cors_origins: sites whose pages may call this server from a browser, "*" for all; None: none.
        api_keys: `/v1` accepts only these; probes, metrics and documentation stay open. None: no keys are needed.
        processes: other processes whose metrics /metrics shows too; None: only the server's own.
        targets: returns the addresses for /metrics/targets.
        unavailable_reason: returns why no request can be answered although there are models, for /health; empty if they
            can.
        missing: returns why a model that is known by name cannot answer, for a 503; empty for an unknown name. None: no
            model is known that cannot answer.
    """
    app = FastAPI(title="dynamo", version=__version__, docs_url="/docs", redoc_url=None, redirect_slashes=False)
    shared = RouteContext(backend, max_body_bytes, timeout_s, missing)
    if processes is not None:
        processes.share(shared.metrics.registry)
    add_info_routes(
        app, backend, shared.metrics, processes=processes, targets=targets, unavailable_reason=unavailable_reason
    )
    app.add_exception_handler(HTTPException, _http_exception)
    add_error_handlers(app)
    generating: dict[str, GeneratingRoute] = {
        "/v1/chat/completions": ChatCompletions(shared),
        "/v1/completions": Completions(shared),
    }
    for path, route in generating.items():
        app.router.routes.append(Route(path, route, methods=["POST"]))  # for other methods and trailing slashes
    _describe(app, generating)

    async def shortcut(scope: Scope, receive: Receive, send: Send) -> None:
        """Call generating routes without FastAPI's layers, which cost 25 µs a request and, with validation, 250."""
        direct = generating.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        await (direct or app)(scope, receive, send)

    layered: ASGIApp = shortcut
    if api_keys:
        layered = ApiKeys(layered, api_keys)
    if cors_origins:
        layered = CORSMiddleware(
            layered,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    return RequestIds(layered)


async def _http_exception(request: Request, error: Exception) -> Response:
    """Answer OPTIONS with the allowed methods, and any other HTTPException with an error."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405 and request.method == "OPTIONS":
        return Response(status_code=204, headers=error.headers)
    return await http_exception(request, error)


def _describe(app: FastAPI, generating: dict[str, GeneratingRoute]) -> None:
    """Add the generating routes, which FastAPI does not know, to the application's OpenAPI schema."""

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for path, route in generating.items():
                content = {"application/json": {"schema": route.request_model.model_json_schema()}}
                responses = {"200": {"description": "JSON, or server-sent events when `stream` is true"}}
                schema["paths"][path] = {"post": {"requestBody": {"content": content}, "responses": responses}}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
