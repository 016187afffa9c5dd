"""One `@api` method as FastAPI calls it: parameters from the request, and a response from the result."""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from types import NoneType, UnionType
from typing import Any, TypeGuard, Union, get_args, get_origin, get_type_hints

import msgspec
from fastapi import Body, Depends, Query
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.params import Form
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from dynamo.http import errors
from dynamo.http.access_log import log_stream_error


def handler(method: Callable[..., Any], path: str, verb: str) -> Callable[..., Awaitable[Response]]:
    """Return the function for FastAPI: it takes the method's parameters and returns a response."""
    on_loop = _on_loop(method)

    async def answer(**given: Any) -> Response:
        result = method(**given) if on_loop else await run_in_threadpool(method, **given)
        if inspect.isawaitable(result):  # for a Stream, this waits until the service behind it has accepted
            result = await result
        if isinstance(result, Response):
            return result
        if inspect.isgenerator(result):
            result = iterate_in_threadpool(result)
        if isinstance(result, AsyncIterable):
            return await _stream(result, method.__qualname__)
        return Response(to_json(result), media_type="application/json")

    answer.__signature__ = _signature(method, path, verb)  # type: ignore[attr-defined]
    return answer


# -- parameters


def _signature(method: Callable[..., Any], path: str, verb: str) -> inspect.Signature:
    """Return the method's signature with resolved annotations. A parameter without one is a key of the JSON body.

    So is a number or a string if the method takes no model and the URL's query does not have it: ai-dynamo 0.2 had it
    in the body, 0.3 in the query.
    """
    hints = get_type_hints(method, include_extras=True)
    taken = [
        p for p in inspect.signature(method).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    in_path = {p.name for p in taken if f"{{{p.name}" in path}
    query_or_body = verb in ("POST", "PUT", "PATCH") and all(
        p.name in in_path or p.name not in hints or _is_plain(hints[p.name]) for p in taken
    )
    parameters = []
    for parameter in taken:
        name, default = parameter.name, parameter.default
        annotation = hints.get(name, Any)
        if name not in in_path and not type(default).__module__.startswith("fastapi."):
            if name not in hints:
                default = Body(embed=True) if default is parameter.empty else Body(default, embed=True)
            elif query_or_body:
                default = Depends(_query_or_body(name, annotation, default))
        parameters.append(parameter.replace(annotation=annotation, default=default, kind=parameter.KEYWORD_ONLY))
    return inspect.Signature(parameters)


def _is_plain(annotation: Any) -> bool:
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return all(kind in (str, int, float, bool, NoneType) for kind in kinds)


def _query_or_body(name: str, annotation: Any, default: Any) -> Callable[..., Awaitable[Any]]:
    """Return a FastAPI dependency that takes a parameter from the query, else from the JSON body."""
    adapter: TypeAdapter[Any] = TypeAdapter(annotation)

    async def value(request: Request, **given: Any) -> Any:
        if name in request.query_params:
            return given[name]
        try:
            body = json.loads(await request.body() or b"{}")
        except ValueError as error:
            problem = {
                "type": "json_invalid",
                "loc": ("body",),
                "msg": "JSON decode error",
                "ctx": {"error": str(error)},
            }
            raise RequestValidationError([problem]) from None
        if not isinstance(body, dict) or name not in body:
            if default is not inspect.Parameter.empty:
                return default
            missing = {"type": "missing", "loc": ("body", name), "msg": "Field required", "input": body}
            raise RequestValidationError([missing])
        try:
            return adapter.validate_python(body[name])
        except ValidationError as error:
            problems = [{**problem, "loc": ("body", name)} for problem in error.errors(include_url=False)]
            raise RequestValidationError(problems) from None

    value.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Request),
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation | None, default=Query(None)),
        ]
    )
    return value


def takes_json(route: BaseRoute) -> TypeGuard[APIRoute]:
    """Return True for a route whose parameters FastAPI reads from a JSON body."""
    if not isinstance(route, APIRoute) or route.body_field is None:
        return False
    return not isinstance(route.body_field.field_info, Form)


def read_form_as_json(app: ASGIApp) -> ASGIApp:
    """Wrap a route so that it reads bodies as JSON that are labelled as a form, or not at all: `curl -d` does so."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
        given = b"".join(value for name, value in scope["headers"] if name == b"content-type")
        if given.partition(b";")[0].strip().lower() in (b"", b"application/x-www-form-urlencoded"):
            scope = {**scope, "headers": [*others, (b"content-type", b"application/json")]}
        await app(scope, receive, send)

    return wrapped


def _on_loop(method: Callable[..., Any]) -> bool:
    """Decide where to call a method: True for the event loop, False for a thread, since a plain `def` may block."""
    if inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method):
        return True
    returns = get_type_hints(method).get("return")
    kind = get_origin(returns) or returns
    return inspect.isclass(kind) and issubclass(kind, (AsyncIterable, Awaitable))


# -- results


def _encode_other(value: Any) -> Any:
    dump = getattr(value, "model_dump", None)
    return dump(mode="json") if callable(dump) else jsonable_encoder(value)


to_json = msgspec.json.Encoder(enc_hook=_encode_other).encode


async def _stream(items: AsyncIterable[Any], place: str) -> Response:
    """Return a streaming response: plain text if the first item is text, else server-sent events.

    Errors before the first item are raised, and so get their own status.
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
    events = _closing(_events(first, iterator, place), items)
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


async def _closing(chunks: AsyncGenerator[bytes, None], items: AsyncIterable[Any]) -> AsyncIterator[bytes]:
    """Yield chunks, and close the method's generator as soon as the client disconnects, not when it is collected."""
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


async def _events(first: list[Any], rest: AsyncIterator[Any], place: str) -> AsyncGenerator[bytes, None]:
    try:
        for item in first:
            yield b"data: %b\n\n" % to_json(item)
        async for item in rest:
            yield b"data: %b\n\n" % to_json(item)
    except Exception as error:  # the status has been sent: the client reads the error in the stream
        log_stream_error(place, error)
        yield b"event: error\ndata: %b\n\n" % errors.body(error)
