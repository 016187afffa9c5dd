"""`@api` methods and health checks as a FastAPI application, and the server of one service's process."""

from __future__ import annotations

import asyncio
import functools
import inspect
import random
import socket
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import aclosing
from typing import Any, NamedTuple, get_origin, get_type_hints

import msgspec
from fastapi import Body, FastAPI
from fastapi.encoders import jsonable_encoder
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp

from dynamo.errors import DynamoError, GraphError, StartError
from dynamo.http import failure
from dynamo.http.edge import RequestIds
from dynamo.http.server import BACKLOG, HttpServer

FREE_PORTS = range(20000, 32768)  # below the range that the kernel gives to outgoing connections
TRIES = 50

Check = Callable[[], Awaitable[tuple[int, str]]]
"""Gives the HTTP status and the text of a health check's answer."""


class Answer(NamedTuple):
    """`verb` `path` is answered by `method`, bound to its service."""

    path: str
    verb: str
    method: Callable[..., Any]


def create_api(app: Any, title: str, answers: Iterable[Answer], checks: Mapping[str, Check]) -> ASGIApp:
    """The application of one service. `app` is the author's own, or None for a new FastAPI of that title.

    `checks` are paths of GET; a path that the author's application answers itself stays his. Raises GraphError for an
    application or a method that FastAPI cannot serve.
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
    for answer in answers:
        try:
            app.add_api_route(
                answer.path,
                _handler(answer.method),
                methods=[answer.verb],
                name=answer.method.__name__,
                description=inspect.getdoc(answer.method) or "",
                response_model=None,  # what a method returns is sent, whatever its annotation says
            )
        except Exception as error:  # an annotation that is no type for a request
            raise GraphError(
                f"{title}.{answer.method.__name__}: FastAPI cannot serve this signature: {error}",
                hint="annotate its parameters with pydantic models or plain types",
            ) from error
    if DynamoError not in app.exception_handlers:
        app.add_exception_handler(DynamoError, _failed)
    return RequestIds(app)


def _add_check(app: FastAPI, path: str, check: Check) -> None:
    if any(getattr(route, "path", None) == path for route in app.router.routes):
        return

    async def answer() -> Response:
        status, text = await check()
        return PlainTextResponse(text, status)

    app.add_api_route(path, answer, methods=["GET"], include_in_schema=False)


async def _failed(_: Request, error: Exception) -> Response:
    failure.report(error)
    extra = {key.decode(): value.decode() for key, value in failure.headers(error)}
    return Response(failure.body(error), failure.status_of(error), extra, media_type="application/json")


# -- one method


def _handler(method: Callable[..., Any]) -> Callable[..., Awaitable[Response]]:
    """What FastAPI calls: with the method's parameters, and with a response as its result."""
    signature, on_loop = _signature(method), _on_loop(method)

    async def answer(**given: Any) -> Response:
        result = method(**given) if on_loop else await run_in_threadpool(method, **given)
        if inspect.isawaitable(result):  # a Stream too: until the service behind it has accepted
            result = await result
        if isinstance(result, Response):
            return result
        if inspect.isgenerator(result):
            result = iterate_in_threadpool(result)
        if isinstance(result, AsyncIterable):
            return await _stream(result)
        return Response(to_json(result), media_type="application/json")

    answer.__signature__ = signature  # type: ignore[attr-defined]
    return answer


def _signature(method: Callable[..., Any]) -> inspect.Signature:
    """With annotations resolved. A parameter without one is a key of the JSON body."""
    hints = get_type_hints(method, include_extras=True)
    parameters = []
    for parameter in inspect.signature(method).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default = parameter.default
        if parameter.name not in hints and not type(default).__module__.startswith("fastapi."):
            body = Body(embed=True) if default is parameter.empty else Body(default, embed=True)
            parameter = parameter.replace(annotation=Any, default=body)
        else:
            parameter = parameter.replace(annotation=hints.get(parameter.name, Any))
        parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY))
    return inspect.Signature(parameters)


def _on_loop(method: Callable[..., Any]) -> bool:
    """Whether to call it on the event loop; a plain `def` that may block goes to a thread, as FastAPI does it."""
    if inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method):
        return True
    returns = get_type_hints(method).get("return")
    kind = get_origin(returns) or returns
    return inspect.isclass(kind) and issubclass(kind, (AsyncIterable, Awaitable))


def _encode_other(value: Any) -> Any:
    dump = getattr(value, "model_dump", None)
    return dump(mode="json") if callable(dump) else jsonable_encoder(value)


to_json = msgspec.json.Encoder(enc_hook=_encode_other).encode


async def _stream(items: AsyncIterable[Any]) -> Response:
    """The first item decides: text goes out as text, anything else as server-sent events.

    What fails before it is an answer with its own status.
    """
    iterator = aiter(items)
    try:
        first = [await anext(iterator)]
    except StopAsyncIteration:
        first = []
    if not first or isinstance(first[0], str | bytes):
        kind = "text/plain; charset=utf-8" if not first or isinstance(first[0], str) else "application/octet-stream"
        return StreamingResponse(_closing(_chunks(first, iterator), items), media_type=kind)
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(_closing(_events(first, iterator), items), media_type="text/event-stream", headers=headers)


async def _closing(chunks: AsyncGenerator[bytes, None], items: AsyncIterable[Any]) -> AsyncIterator[bytes]:
    """A client that leaves closes the method's generator now, and not when it is collected."""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk
    finally:
        close = getattr(items, "aclose", None)
        if close is not None:
            await close()


async def _chunks(first: list[Any], rest: AsyncIterator[Any]) -> AsyncGenerator[bytes, None]:
    for item in first:
        yield _chunk(item)
    async for item in rest:
        yield _chunk(item)


def _chunk(item: Any) -> bytes:
    if isinstance(item, bytes):
        return item
    return item.encode() if isinstance(item, str) else to_json(item)


async def _events(first: list[Any], rest: AsyncIterator[Any]) -> AsyncGenerator[bytes, None]:
    try:
        for item in first:
            yield b"data: %b\n\n" % to_json(item)
        async for item in rest:
            yield b"data: %b\n\n" % to_json(item)
    except Exception as error:  # the status has gone out: the client reads it here
        failure.report(error)
        yield b"event: error\ndata: %b\n\n" % failure.body(error)


# -- the server


def listen(host: str, port: int | None, *, shared: bool = False) -> socket.socket:
    """A socket that listens there, on a free port of `FREE_PORTS` for None or 0; `shared` with others that share it.

    Raises StartError when the port is taken.
    """
    ports: Iterator[int] = iter([port] if port else random.sample(FREE_PORTS, TRIES))
    for candidate in ports:
        try:
            return _bound(host, candidate, shared)
        except OSError as error:
            if port:
                raise StartError(
                    f"cannot listen on {host}:{port}: {error.strerror or error}",
                    hint="choose another port: `port` in the service's configuration, or --port",
                ) from None
    raise StartError(f"no free port on {host}", hint="give the service a `port` in the configuration")


def _bound(host: str, port: int, shared: bool) -> socket.socket:
    anywhere = host == "::"  # all addresses, IPv4 too
    listener = socket.create_server(
        ("" if anywhere else host, port),
        family=socket.AF_INET6 if ":" in host else socket.AF_INET,
        backlog=BACKLOG,
        reuse_port=shared,
        dualstack_ipv6=anywhere,
    )
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class ApiServer(HttpServer):
    """Serves an application on a socket that listens already, with the application's own start and end (lifespan)."""

    def __init__(self, app: ASGIApp, host: str, listener: socket.socket) -> None:
        super().__init__(app, host, listener.getsockname()[1])
        self._listener = listener
        self._server.config.lifespan = "auto"

    async def start(self) -> None:
        """Accepting when it returns. Raises StartError when the application's own start failed."""
        serve = functools.partial(self._server.serve, [self._listener])
        self._task = asyncio.get_running_loop().create_task(serve(), name="api server")
        while not self._server.started:
            if self._task.done():
                raise StartError(f"the HTTP server did not start on {self.host}:{self.port}", hint="read its log above")
            await asyncio.sleep(0.005)
