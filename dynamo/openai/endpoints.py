"""The routes that generate: from a request's bytes to the backend's stream and the answer that is made of it."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from typing import NamedTuple

import msgspec
from starlette.types import Receive, Scope, Send

from dynamo import context as request_scope
from dynamo.errors import ModelNotFoundError, RequestError, UnavailableError
from dynamo.http import access_log
from dynamo.http.direct import respond_error
from dynamo.http.middleware import DIRECT, header, request_name
from dynamo.llm.protocol import ChatRequest, CompletionRequest, Delta, ServedModel
from dynamo.openai import streaming
from dynamo.openai.backend import Backend
from dynamo.openai.metrics import Metrics, Observation
from dynamo.openai.responses import Answer, ChatAnswer, TextAnswer
from dynamo.openai.schema import ChatCompletionRequest, SamplingFields, TextCompletionRequest, parse
from dynamo.streams import Channel, Stream

log = logging.getLogger(__name__)

MAX_REPORTED_FIELDS = 100


class BodyTooLargeError(RequestError):
    """The body is larger than this server takes."""

    status = 413
    code = "request_too_large"


class ClientGoneError(Exception):
    """The client left before its request was complete: there is nobody to answer."""


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """Raises BodyTooLargeError, at once where the headers tell, and ClientGoneError."""
    announced = header(scope, b"content-length")
    if announced.isdecimal() and int(announced) > limit:
        raise BodyTooLargeError(f"The request body is larger than {limit} bytes.")
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise BodyTooLargeError(f"The request body is larger than {limit} bytes.")
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


class Api:
    """What the generating routes share."""

    def __init__(self, backend: Backend, max_body_bytes: int, timeout_s: float | None) -> None:
        self.backend, self.max_body_bytes, self.timeout_s = backend, max_body_bytes, timeout_s
        self.metrics = Metrics(lambda: [model.name for model in backend.models()])
        self._reported: set[str] = set()

    def model(self, name: str) -> ServedModel:
        """The model a request names. Raises ModelNotFoundError, or UnavailableError while none is there.

        A request that names none gets the only one.
        """
        models = self.backend.models()
        for model in models:
            if model.name == name:
                return model
        if not models:
            raise UnavailableError("no model is ready", hint="it is starting or restarting; see /health")
        if not name and len(models) == 1:
            return models[0]
        names = ", ".join(m.name for m in models)
        if not name:
            raise RequestError("you must provide a model parameter", hint=f"models: {names}", param="model")
        raise ModelNotFoundError(f"The model `{name}` does not exist.", hint=f"models: {names}", param="model")

    def report_unknown(self, given: SamplingFields) -> None:
        """Unknown fields are ignored, as vLLM does; each is logged once, the first of them at least."""
        for name in given.model_extra or ():
            if name not in self._reported and len(self._reported) < MAX_REPORTED_FIELDS:
                self._reported.add(name)
                log.warning("request field %.80r is not known and has no effect", name)


class Started(NamedTuple):
    """Calls to the backend that will be made for a request, and the answer they are to fill."""

    calls: list[ChatRequest] | list[CompletionRequest]
    answer: Answer
    streaming: bool


class GeneratingRoute(ABC):
    """An ASGI app for one generating route."""

    endpoint = ""
    """its name in metrics and logs"""
    accepts: type[SamplingFields]

    def __init__(self, api: Api) -> None:
        self._api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived = time.monotonic()
        api = self._api
        try:
            body = await read_body(scope, receive, api.max_body_bytes)
            started = self._prepare(body, request_name(scope))
        except ClientGoneError:
            access_log.log_disconnected(self.endpoint, time.monotonic() - arrived)
            return
        except Exception as error:
            api.metrics.refused(self.endpoint, error)
            access_log.log_rejected(self.endpoint, error, time.monotonic() - arrived)
            await respond_error(send, error)
            return
        if api.timeout_s is not None:
            request_scope.deadline.set(request_scope.after(api.timeout_s))
        answer = started.answer
        seen = Observation(api.metrics, answer.model, self.endpoint, stream=started.streaming, started=arrived)
        try:
            stream = self._call(started)
        except Exception as error:
            seen.done("error", error=error)
            await respond_error(send, error)
            return
        if started.streaming:
            await streaming.Events(receive, send, stream, answer, seen, scope.get(DIRECT)).run()
        else:
            await streaming.Whole(receive, send, stream, answer, seen).run()

    @abstractmethod
    def _prepare(self, body: bytes, name: str) -> Started:
        """Raises RequestError and its kind."""

    @abstractmethod
    def _call(self, started: Started) -> Stream[Delta]: ...


class ChatCompletions(GeneratingRoute):
    endpoint = "chat_completions"
    accepts = ChatCompletionRequest

    def _prepare(self, body: bytes, name: str) -> Started:
        given = parse(ChatCompletionRequest, body)
        request = given.to_request()
        request.model = self._api.model(given.model).name
        self._api.report_unknown(given)
        sampling = request.sampling
        answer = ChatAnswer(
            f"chatcmpl-{name}",
            request.model,
            sampling.n,
            include_usage=given.include_usage,
            top_logprobs=sampling.logprobs or 0,
        )
        return Started([request], answer, given.stream)

    def _call(self, started: Started) -> Stream[Delta]:
        return self._api.backend.chat(started.calls[0])  # type: ignore[arg-type]


class Completions(GeneratingRoute):
    endpoint = "completions"
    accepts = TextCompletionRequest

    def _prepare(self, body: bytes, name: str) -> Started:
        given = parse(TextCompletionRequest, body)
        requests = given.to_requests()
        model = self._api.model(given.model).name
        self._api.report_unknown(given)
        for request in requests:
            request.model = model
        choices = requests[0].sampling.n * len(requests)
        answer = TextAnswer(f"cmpl-{name}", model, choices, include_usage=given.include_usage)
        return Started(requests, answer, given.stream)

    def _call(self, started: Started) -> Stream[Delta]:
        streams: list[Stream[Delta]] = []
        try:
            for request in started.calls:
                streams.append(self._api.backend.completion(request))  # type: ignore[arg-type]
        except Exception:
            for stream in streams:
                stream.cancel()
            raise
        return merge(streams, started.answer.choices // len(streams))


def merge(streams: list[Stream[Delta]], choices: int) -> Stream[Delta]:
    """Several prompts' streams as one: prompt i's choices get the indexes from i * `choices`. The first error ends all."""
    if len(streams) == 1:
        return streams[0]

    def cancel() -> None:
        for stream in streams:
            stream.cancel()

    out: Channel[Delta] = Channel(on_cancel=cancel)
    left = len(streams)

    def end(error: BaseException | None) -> None:
        nonlocal left
        left -= 1
        if error is not None:
            out.end(error)
            cancel()
        elif left == 0:
            out.end()

    def add(offset: int, delta: Delta) -> None:
        # not in place: the delta is its producer's
        out.push(msgspec.structs.replace(delta, index=delta.index + offset) if offset else delta)

    for i, stream in enumerate(streams):
        stream.pipe(lambda delta, offset=i * choices: add(offset, delta), end)  # type: ignore[misc]
    return Stream(out)
