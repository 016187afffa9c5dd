"""Routes of the OpenAI-compatible server over a `Backend`."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dynamo import __version__
from dynamo.errors import DynamoError, ModelNotFoundError, RequestError, UnavailableError
from dynamo.http import failure, sse
from dynamo.http.answer import Answer, ChatAnswer, TextAnswer
from dynamo.http.backend import Backend
from dynamo.http.metrics import Metrics, Observation
from dynamo.http.sse import Headers
from dynamo.llm.openai import ChatCompletionRequest, TextCompletionRequest, parse
from dynamo.llm.protocol import Delta, ServedModel
from dynamo.log import request_id
from dynamo.wire import scope as request_scope
from dynamo.wire.stream import Stream

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 << 20
_TRANSPORT = "dynamo.transport"


class _TooLargeError(RequestError):
    status = 413
    code = "request_too_large"


async def _read_body(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _TooLargeError(f"the request body is larger than {limit} bytes")
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


Start = Callable[[bytes, str], tuple[Stream[Delta], Answer, bool, int]]
"""body, request id -> (deltas, answer, whether to stream, choices)"""


class _Generation:
    """An ASGI app for one generating route. `start` validates the body and calls the backend."""

    def __init__(self, name: str, api: _Api, start: Start) -> None:
        self._name, self._api, self._start = name, api, start

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        rid = _header(scope, b"x-request-id")[:128] or uuid.uuid4().hex
        headers: Headers = [(b"x-request-id", rid.encode("latin-1", "replace"))]
        id_token = request_id.set(rid)
        try:
            body = await _read_body(receive, self._api.max_body_bytes)
            stream, answer, streaming, choices = self._start(body, rid)
        except ConnectionResetError:
            return
        except DynamoError as error:
            await sse.respond_error(send, error, headers)
            return
        finally:
            request_id.reset(id_token)
        observation = Observation(self._api.metrics, answer.model, self._name, stream=streaming)
        if streaming:
            transport = scope.get(_TRANSPORT)
            events = sse.Events(
                receive, send, stream, answer, observation, headers, transport=transport, choices=choices
            )
            await events.run()
        else:
            await sse.Whole(receive, send, stream, answer, observation, headers).run()


class _Api:
    """The routes' common state."""

    def __init__(self, backend: Backend, max_body_bytes: int, timeout_s: float | None) -> None:
        self.backend, self.max_body_bytes, self.timeout_s = backend, max_body_bytes, timeout_s
        self.metrics = Metrics()
        self._reported: set[str] = set()

    def model(self, name: str) -> ServedModel:
        """The model a request names. Raises ModelNotFoundError, or UnavailableError while it is away."""
        models = self.backend.models()
        if not name and len(models) == 1:
            return models[0]
        for model in models:
            if model.name == name:
                return model
        if not models:
            raise UnavailableError("no model is ready", hint="it is starting or restarting; see /health")
        if not name:
            raise RequestError("you must provide a model parameter", param="model")
        raise ModelNotFoundError(
            f"The model `{name}` does not exist.", hint=f"models: {', '.join(m.name for m in models)}", param="model"
        )

    def deadline(self) -> None:
        """Requests made from here on, in this task, have this long."""
        if self.timeout_s is not None:
            request_scope.deadline.set(request_scope.after(self.timeout_s))

    def report_unknown(self, given: Any) -> None:
        """Unknown fields are ignored, as vLLM does; each is logged once."""
        for name in set(given.model_extra or ()) - self._reported:
            self._reported.add(name)
            log.warning("request field %r is not known and has no effect", name)

    def start_chat(self, body: bytes, rid: str) -> tuple[Stream[Delta], Answer, bool, int]:
        given: ChatCompletionRequest = parse(ChatCompletionRequest, body)
        self.report_unknown(given)
        request = given.to_request()
        request.model = self.model(given.model).name
        self.deadline()
        answer = ChatAnswer(f"chatcmpl-{rid}", request.model, include_usage=given.include_usage)
        return self.backend.chat(request), answer, given.stream, request.sampling.n

    def start_completion(self, body: bytes, rid: str) -> tuple[Stream[Delta], Answer, bool, int]:
        given: TextCompletionRequest = parse(TextCompletionRequest, body)
        self.report_unknown(given)
        requests = given.to_requests()
        name = self.model(given.model).name
        self.deadline()
        streams: list[Stream[Delta]] = []
        for request in requests:
            request.model = name
            streams.append(self.backend.completion(request))
        answer = TextAnswer(f"cmpl-{rid}", name, include_usage=given.include_usage)
        choices = requests[0].sampling.n
        return sse.merge(streams, choices), answer, given.stream, choices * len(streams)


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


def create_app(backend: Backend, *, max_body_bytes: int = MAX_BODY_BYTES, timeout_s: float | None = None) -> ASGIApp:
    """The ASGI application. `timeout_s` is each request's deadline; None: no limit."""
    app = FastAPI(title="dynamo", version=__version__, docs_url="/docs", redoc_url=None)
    api = _Api(backend, max_body_bytes, timeout_s)

    @app.get("/v1/models", summary="Models that can answer now")
    async def models() -> Response:
        return _json({"object": "list", "data": [_model(m) for m in backend.models()]})

    @app.get("/v1/models/{name:path}", summary="One model")
    async def model(name: str) -> Response:
        found = api.model(name)
        return _json(_model(found))

    @app.get("/health", summary="200 when a model can answer, else 503")
    async def health() -> Response:
        names = [m.name for m in backend.models()]
        state = {"status": "healthy" if names else "starting", "models": names, "instances": backend.endpoints()}
        return _json(state, 200 if names else 503)

    @app.get("/live", summary="200 while the process runs")
    async def live() -> Response:
        return _json({"status": "live"})

    @app.get("/metrics", summary="Prometheus metrics")
    async def metrics() -> Response:
        body, kind = api.metrics.exposition()
        return Response(body, media_type=kind)

    @app.exception_handler(DynamoError)
    async def failed(_: Request, error: DynamoError) -> Response:
        extra = {k.decode(): v.decode() for k, v in failure.headers(error)}
        return _json(failure.envelope(error), failure.status_of(error), extra)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        text = {
            404: f"Unknown request URL: {request.method} {path}.",
            405: f"{request.method} is not allowed on {path}.",
        }
        body = {"message": text.get(error.status_code, str(error.detail)), "type": "invalid_request_error",
                "param": None, "code": "unknown_url" if error.status_code == 404 else None}  # fmt: skip
        return _json({"error": body}, error.status_code, dict(error.headers or {}))

    generating: dict[str, tuple[str, Start, type[BaseModel]]] = {
        "/v1/chat/completions": ("chat_completions", api.start_chat, ChatCompletionRequest),
        "/v1/completions": ("completions", api.start_completion, TextCompletionRequest),
    }
    for path, (name, start, _) in generating.items():
        # plain ASGI: FastAPI's own request path costs 250 µs a request
        app.router.routes.append(Route(path, _Generation(name, api, start), methods=["POST"]))

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for path, (_, _, request) in generating.items():
                content = {"application/json": {"schema": request.model_json_schema()}}
                answers = {"200": {"description": "JSON, or server-sent events when `stream` is true"}}
                schema["paths"][path] = {"post": {"requestBody": {"content": content}, "responses": answers}}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]

    async def outermost(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope[_TRANSPORT] = sse.direct_transport(send)  # before any middleware wraps `send`
        await app(scope, receive, send)

    return outermost
