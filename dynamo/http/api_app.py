"""`@api` methods and health checks as a FastAPI application, and the server of one service's process."""

from __future__ import annotations

import asyncio
import functools
import inspect
import random
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp

from dynamo.errors import DynamoError, GraphError, StartError
from dynamo.http import errors
from dynamo.http.api_route import handler
from dynamo.http.middleware import RequestIds
from dynamo.http.prometheus_text import CONTENT_TYPE
from dynamo.http.server import HttpServer, listening

FREE_PORTS = range(20000, 32768)  # below the range that the kernel gives to outgoing connections
TRIES = 50

Check = Callable[[], Awaitable[tuple[int, str]]]
"""Gives the HTTP status and the text of a health check's answer."""


class Answer(NamedTuple):
    """`verb` `path` is answered by `method`, bound to its service."""

    path: str
    verb: str
    method: Callable[..., Any]


def create_api(
    app: Any,
    title: str,
    answers: Iterable[Answer],
    checks: Mapping[str, Check],
    metrics: Callable[[], bytes] | None = None,
) -> ASGIApp:
    """The application of one service. `app` is the author's own, or None for a new FastAPI of that title.

    `checks` are paths of GET, `metrics` gives what /metrics answers; a path that the author's application answers itself
    stays his. Raises GraphError for an application or a method that FastAPI cannot serve.
    """
    if app is None:
        app = FastAPI(title=title)
    answers = list(answers)
    if not isinstance(app, FastAPI):
        if answers:
            raise GraphError(
                f"{title}: app is a {type(app).__name__}, which cannot take @api methods",
                hint="pass app=FastAPI() to @service, or leave it out",
            )
        return RequestIds(app)
    for path, check in checks.items():
        _add_check(app, path, check)
    if metrics is not None:
        _add_metrics(app, metrics)
    for answer in answers:
        try:
            app.add_api_route(
                answer.path,
                handler(answer.method, answer.path, answer.verb),
                methods=[answer.verb],
                name=answer.method.__name__,
                description=inspect.getdoc(answer.method) or "",
                response_model=None,  # what a method returns is sent, whatever its annotation says
            )
        except Exception as error:  # such as an annotation that is no type for a request
            raise GraphError(
                f"{title}.{answer.method.__name__}: FastAPI cannot serve this signature: {error}",
                hint="annotate its parameters with pydantic models or plain types",
            ) from error
    if DynamoError not in app.exception_handlers:
        app.add_exception_handler(DynamoError, _failed)
    return RequestIds(app)


def _answers(app: FastAPI, path: str) -> bool:
    return any(getattr(route, "path", None) == path for route in app.router.routes)


def _add_metrics(app: FastAPI, metrics: Callable[[], bytes]) -> None:
    if _answers(app, "/metrics"):
        return

    async def answer() -> Response:
        return Response(metrics(), headers={"content-type": CONTENT_TYPE})

    app.add_api_route("/metrics", answer, methods=["GET"], include_in_schema=False)


def _add_check(app: FastAPI, path: str, check: Check) -> None:
    if _answers(app, path):
        return

    async def answer() -> Response:
        status, text = await check()
        return PlainTextResponse(text, status)

    app.add_api_route(path, answer, methods=["GET"], include_in_schema=False)


async def _failed(_: Request, error: Exception) -> Response:
    errors.report(error)
    extra = {key.decode(): value.decode() for key, value in errors.headers(error)}
    return Response(errors.body(error), errors.status_of(error), extra, media_type="application/json")


# -- the server


def listen(host: str, port: int | None, *, shared: bool = False) -> socket.socket:
    """A socket that listens there, on a free port of `FREE_PORTS` for None or 0; `shared` with others that share it.

    Raises StartError when the port is taken.
    """
    ports: Iterator[int] = iter([port] if port else random.sample(FREE_PORTS, TRIES))
    for candidate in ports:
        try:
            return listening(host, candidate, shared=shared)
        except OSError as error:
            if port:
                raise StartError(
                    f"cannot listen on {host}:{port}: {error.strerror or error}",
                    hint="choose another port: `port` in the service's configuration, or --port",
                ) from None
    raise StartError(f"no free port on {host}", hint="give the service a `port` in the configuration")


class ApiServer(HttpServer):
    """Serves an application on a socket that listens already, with the application's own start and end (lifespan)."""

    def __init__(self, app: ASGIApp, host: str, listener: socket.socket) -> None:
        super().__init__(app, host, listener.getsockname()[1], listener)
        self._server.config.lifespan = "auto"

    async def start(self) -> None:
        """Accepting when it returns. Raises StartError when the application's own start failed."""
        assert self._listener is not None
        serve = functools.partial(self._server.serve, [self._listener])
        self._task = asyncio.get_running_loop().create_task(serve(), name="api server")
        while not self._server.started:
            if self._task.done():
                raise StartError(f"the HTTP server did not start on {self.host}:{self.port}", hint="read its log above")
            await asyncio.sleep(0.005)
