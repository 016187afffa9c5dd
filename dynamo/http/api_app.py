"""The FastAPI application of one service: its `@api` methods, health checks and metrics."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, NamedTuple

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp

from dynamo.errors import GraphError
from dynamo.http.api_route import handler, read_form_as_json, takes_json
from dynamo.http.error_handlers import ERROR_RESPONSES, add_error_handlers
from dynamo.http.middleware import RequestIds
from dynamo.http.prometheus_text import CONTENT_TYPE

HealthCheck = Callable[[], Awaitable[tuple[int, str]]]
"""Returns the HTTP status and the text of a health check's response."""


class BoundRoute(NamedTuple):
    """A path and an HTTP verb, served by a method that is bound to its service."""

    path: str
    verb: str
    method: Callable[..., Any]


def create_api(
    app: Any,
    title: str,
    routes: Iterable[BoundRoute],
    checks: Mapping[str, HealthCheck],
    metrics: Callable[[], bytes] | None = None,
) -> ASGIApp:
    """Return the ASGI application of one service.

    Paths that the author's own application defines take precedence over `checks` and `metrics`, and so do its exception
    handlers over those that answer with OpenAI's error body. Raises GraphError for an application or a method that
    FastAPI cannot serve.

    Args:
        app: the author's own application; None: a new FastAPI.
        title: title of a new FastAPI, and the service's name in errors.
        routes: the `@api` methods.
        checks: path -> health check, for GET.
        metrics: renders the response to GET /metrics; None: no such path.
    """
    if app is None:
        app = FastAPI(title=title)
    routes = list(routes)
    if isinstance(app, Starlette):
        add_error_handlers(app)
    if not isinstance(app, FastAPI):
        if routes:
            raise GraphError(
                f"{title}: app is a {type(app).__name__}, which cannot take @api methods",
                hint="pass app=FastAPI() to @service, or leave it out",
            )
        return RequestIds(app)
    for path, check in checks.items():
        _add_check(app, path, check)
    if metrics is not None:
        _add_metrics(app, metrics)
    for route in routes:
        _add_route(app, title, route)
    return RequestIds(app)


def _add_route(app: FastAPI, title: str, route: BoundRoute) -> None:
    name = route.method.__name__
    try:
        app.add_api_route(
            route.path,
            handler(route.method, route.path, route.verb),
            methods=[route.verb],
            name=name,
            description=inspect.getdoc(route.method) or "",
            responses=ERROR_RESPONSES,
            response_model=None,  # a method's result is sent as it is, not converted to its annotation
        )
    except Exception as error:  # such as an annotation that is no type for a request
        raise GraphError(
            f"{title}.{name}: FastAPI cannot serve this signature: {error}",
            hint="annotate its parameters with pydantic models or plain types",
        ) from error
    added = app.router.routes[-1]
    if takes_json(added):
        added.app = read_form_as_json(added.app)


def _has_path(app: FastAPI, path: str) -> bool:
    return any(getattr(route, "path", None) == path for route in app.router.routes)


def _add_metrics(app: FastAPI, metrics: Callable[[], bytes]) -> None:
    if _has_path(app, "/metrics"):
        return

    async def answer() -> Response:
        return Response(metrics(), headers={"content-type": CONTENT_TYPE})

    app.add_api_route("/metrics", answer, methods=["GET"], include_in_schema=False)


def _add_check(app: FastAPI, path: str, check: HealthCheck) -> None:
    if _has_path(app, path):
        return

    async def answer() -> Response:
        status, text = await check()
        return PlainTextResponse(text, status)

    app.add_api_route(path, answer, methods=["GET"], include_in_schema=False)
