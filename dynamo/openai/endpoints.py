"""The generating routes: from the bytes of a request to the backend's stream and the response that is written from it."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import msgspec
import orjson
from starlette.types import Receive, Scope, Send

from dynamo import context
from dynamo.errors import ModelNotFoundError, RequestError, UnavailableError
from dynamo.http import access_log
from dynamo.http.direct import respond_error
from dynamo.http.middleware import DIRECT, header, request_name
from dynamo.llm.protocol import ChatRequest, CompletionRequest, Delta, ServedModel
from dynamo.openai import streaming
from dynamo.openai.backend import Backend, Forwarder
from dynamo.openai.forwarding import ForwardedChat, ForwardedCompletion, ForwardedResponse
from dynamo.openai.metrics import FrontendMetrics, RequestTracker
from dynamo.openai.responses import ChatResponseBuilder, CompletionResponseBuilder, ResponseBuilder
from dynamo.openai.schema import ChatCompletionRequest, SamplingFields, TextCompletionRequest
from dynamo.openai.validation import parse
from dynamo.streams import Channel, Stream

log = logging.getLogger(__name__)

MAX_REPORTED_FIELDS = 100


class BodyTooLargeError(RequestError):
    """The body is larger than this server accepts."""

    status = 413
    code = "request_too_large"


class ClientDisconnectedError(Exception):
    """The client disconnected before its request was complete, so no response is possible."""


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """Return the request's body. Raises BodyTooLargeError above `limit` bytes, and ClientDisconnectedError."""
    content_length = header(scope, b"content-length")
    if content_length.isdecimal() and int(content_length) > limit:
        raise BodyTooLargeError(f"The request body is larger than {limit} bytes.")
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise BodyTooLargeError(f"The request body is larger than {limit} bytes.")
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


class RouteContext:
    """State shared by the generating routes: the backend, limits and metrics."""

    def __init__(
        self,
        backend: Backend | Forwarder,
        max_body_bytes: int,
        timeout_s: float | None,
        missing: Callable[[str], str] | None = None,
    ) -> None:
        # the one that a request calls is there: its model says which
        self.backend = cast("Backend", backend)
        self.forwarder = cast("Forwarder", backend)
        self.missing = missing
        self.max_body_bytes = max_body_bytes
        self.timeout_s = timeout_s
        self.metrics = FrontendMetrics(lambda: [model.name for model in backend.models()])
        self._reported_fields: set[str] = set()

    def find_model(self, name: str, api: str) -> ServedModel:
        """Return the model that a request names; for an empty name, the only model. `api` is "chat" or "completion".

        Raises ModelNotFoundError, RequestError for an empty name if there are several models, and UnavailableError while
        there is none, or no worker for this one.
        """
        models = self.backend.models()
        for model in models:
            if model.name == name or (not name and len(models) == 1):
                if api not in model.apis:
                    raise ModelNotFoundError(
                        f"The model `{model.name}` does not answer {api} requests.",
                        hint=f"it answers {', '.join(model.apis)} requests",
                        param="model",
                    )
                return model
        if self.missing is not None and (reason := self.missing(name)):
            raise UnavailableError(reason, hint="its workers are starting, restarting or stopped; try again")
        if not models:
            raise UnavailableError("no model is ready", hint="it is starting or restarting; see /health")
        names = ", ".join(m.name for m in models)
        if not name:
            raise RequestError("you must provide a model parameter", hint=f"models: {names}", param="model")
        raise ModelNotFoundError(f"The model `{name}` does not exist.", hint=f"models: {names}", param="model")

    def report_unknown(self, given: SamplingFields) -> None:
        """Log the fields of a request that are unknown and therefore ignored, as vLLM does, each name once.

        No more than `MAX_REPORTED_FIELDS` names are logged.
        """
        for name in given.model_extra or ():
            if name not in self._reported_fields and len(self._reported_fields) < MAX_REPORTED_FIELDS:
                self._reported_fields.add(name)
                log.warning("request field %.80r is not known and has no effect", name)


class PreparedRequest(NamedTuple):
    """The backend calls for one HTTP request, and the builder of its response."""

    calls: Sequence[ChatRequest] | Sequence[CompletionRequest]
    builder: ResponseBuilder
    stream: bool
    forwarded: dict[str, Any] | None = None
    """the request for a worker that takes OpenAI's; there are no `calls` then"""


class GeneratingRoute(ABC):
    """The ASGI application of one generating route."""

    api = ""
    endpoint = ""
    """name in metrics and logs"""
    request_model: type[SamplingFields]

    def __init__(self, shared: RouteContext) -> None:
        self._shared = shared

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived_at = time.monotonic()
        shared = self._shared
        try:
            body = await read_body(scope, receive, shared.max_body_bytes)
            prepared = self._prepare(body, request_name(scope))
        except ClientDisconnectedError:
            access_log.log_disconnected(self.endpoint, time.monotonic() - arrived_at)
            return
        except Exception as error:
            shared.metrics.count_rejected(self.endpoint, error)
            access_log.log_rejected(self.endpoint, error, time.monotonic() - arrived_at)
            await respond_error(send, error)
            return
        if shared.timeout_s is not None:
            context.deadline.set(context.after(shared.timeout_s))
        builder = prepared.builder
        tracker = RequestTracker(
            shared.metrics, builder.model, self.endpoint, stream=prepared.stream, started_at=arrived_at
        )
        try:
            stream = self._call(prepared) if prepared.forwarded is None else self._forward(prepared)
        except Exception as error:
            tracker.finish("error", error=error)
            await respond_error(send, error)
            return
        if prepared.stream:
            await streaming.EventStreamWriter(receive, send, stream, builder, tracker, scope.get(DIRECT)).run()
        else:
            await streaming.JsonResponseWriter(receive, send, stream, builder, tracker).run()

    @abstractmethod
    def _prepare(self, body: bytes, request_id: str) -> PreparedRequest:
        """Validate a body and translate it. Raises RequestError and its subclasses, and UnavailableError."""

    @abstractmethod
    def _call(self, prepared: PreparedRequest) -> Stream[Delta]:
        """Call the backend."""

    def _prepare_forwarded(self, body: bytes, stream: bool, builder: ForwardedResponse) -> PreparedRequest:
        """Return the request as the client sent it, but for the model's name and for `stream`: workers always stream."""
        request: dict[str, Any] = orjson.loads(body)
        usage = {**(request.get("stream_options") or {}), "include_usage": True}
        request |= {"model": builder.model, "stream": True, "stream_options": usage}
        return PreparedRequest((), builder, stream, request)

    def _forward(self, prepared: PreparedRequest) -> Stream[Delta]:
        assert prepared.forwarded is not None
        assert isinstance(prepared.builder, ForwardedResponse)
        # ForwardedChunk is a Delta as far as the writers are concerned
        return self._shared.forwarder.forward(self.api, prepared.forwarded).map(prepared.builder.accept)


class ChatCompletions(GeneratingRoute):
    api = "chat"
    endpoint = "chat_completions"
    request_model = ChatCompletionRequest

    def _prepare(self, body: bytes, request_id: str) -> PreparedRequest:
        given = parse(ChatCompletionRequest, body)
        request = given.to_request()
        model = self._shared.find_model(given.model, self.api)
        request.model = model.name
        response_id = f"chatcmpl-{request_id}"
        if self.api in model.forwarded:
            forwarded = ForwardedChat(response_id, model.name, given.n, include_usage=given.include_usage)
            return self._prepare_forwarded(body, given.stream, forwarded)
        self._shared.report_unknown(given)
        sampling = request.sampling
        builder = ChatResponseBuilder(
            response_id,
            request.model,
            sampling.n,
            include_usage=given.include_usage,
            top_logprobs=sampling.logprobs or 0,
        )
        return PreparedRequest([request], builder, given.stream)

    def _call(self, prepared: PreparedRequest) -> Stream[Delta]:
        return self._shared.backend.chat(prepared.calls[0])  # type: ignore[arg-type]


class Completions(GeneratingRoute):
    api = "completion"
    endpoint = "completions"
    request_model = TextCompletionRequest

    def _prepare(self, body: bytes, request_id: str) -> PreparedRequest:
        given = parse(TextCompletionRequest, body)
        requests = given.to_requests()
        model = self._shared.find_model(given.model, self.api)
        response_id = f"cmpl-{request_id}"
        choices = requests[0].sampling.n * len(requests)
        if self.api in model.forwarded:
            forwarded = ForwardedCompletion(response_id, model.name, choices, include_usage=given.include_usage)
            return self._prepare_forwarded(body, given.stream, forwarded)
        self._shared.report_unknown(given)
        for request in requests:
            request.model = model.name
        builder = CompletionResponseBuilder(response_id, model.name, choices, include_usage=given.include_usage)
        return PreparedRequest(requests, builder, given.stream)

    def _call(self, prepared: PreparedRequest) -> Stream[Delta]:
        streams: list[Stream[Delta]] = []
        try:
            for request in prepared.calls:
                streams.append(self._shared.backend.completion(request))  # type: ignore[arg-type]
        except Exception:
            for stream in streams:
                stream.cancel()
            raise
        return merge_streams(streams, prepared.builder.choices // len(streams))


def merge_streams(streams: list[Stream[Delta]], choices: int) -> Stream[Delta]:
    """Merge the streams of several prompts into one, which the first error ends.

    The choices of prompt i get the indexes from i * `choices`.
    """
    if len(streams) == 1:
        return streams[0]

    def cancel() -> None:
        for stream in streams:
            stream.cancel()

    merged: Channel[Delta] = Channel(on_cancel=cancel)
    running = len(streams)

    def end(error: BaseException | None) -> None:
        nonlocal running
        running -= 1
        if error is not None:
            merged.end(error)
            cancel()
        elif running == 0:
            merged.end()

    def add(offset: int, delta: Delta) -> None:
        # a copy, since the producer may still use its delta
        merged.push(msgspec.structs.replace(delta, index=delta.index + offset) if offset else delta)

    for i, stream in enumerate(streams):
        stream.pipe(lambda delta, offset=i * choices: add(offset, delta), end)  # type: ignore[misc]
    return Stream(merged)
