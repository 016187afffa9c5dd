"""`HttpService` of ai-dynamo 0.1 to 0.3: an OpenAI server for Python functions of the same process."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol

from dynamo.environment import api_keys
from dynamo.errors import DynamoError
from dynamo.http.server import HttpServer
from dynamo.llm.protocol import ServedModel
from dynamo.openai.app import create_app
from dynamo.streams import Stream

log = logging.getLogger(__name__)

DEFAULT_PORT = 8080


class CancellationToken(Protocol):
    """`DistributedRuntime.child_token()`."""

    async def cancelled(self) -> None: ...


class HttpError(DynamoError):
    """An error with an HTTP status of its own, raised by an engine's function."""

    def __init__(self, code: int, message: str, *, hint: str | None = None, param: str | None = None) -> None:
        super().__init__(message, hint=hint, param=param)
        self.status = self.code = code  # type: ignore[misc, assignment]


class HttpAsyncEngine:
    """A function that answers OpenAI requests: it takes the request as a dict and returns an async iterator of chunks."""

    def __init__(
        self, generator: Callable[[dict[str, Any]], Any], event_loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        """`event_loop` is accepted for 0.x and ignored: the running loop is used."""
        self.generate = generator


class HttpService:
    """Serves models that are added to it. It listens on this host alone, unless DYNAMO_HOST says otherwise."""

    def __init__(self, port: int | None = None) -> None:
        self.port = DEFAULT_PORT if port is None else port
        self._engines: dict[str, dict[str, HttpAsyncEngine]] = {"chat": {}, "completion": {}}
        self._created = int(time.time())

    def add_chat_completions_model(self, model: str, engine: HttpAsyncEngine) -> None:
        """Serve chat requests for a model by an engine. Raises ValueError if the model has one."""
        self._add("chat", model, engine)

    def add_completions_model(self, model: str, engine: HttpAsyncEngine) -> None:
        """Serve text completions for a model by an engine. Raises ValueError if the model has one."""
        self._add("completion", model, engine)

    def remove_chat_completions_model(self, model: str) -> None:
        """Stop serving chat requests for a model. Raises ValueError for an unknown one."""
        self._remove("chat", model)

    def remove_completions_model(self, model: str) -> None:
        """Stop serving text completions for a model. Raises ValueError for an unknown one."""
        self._remove("completion", model)

    def list_chat_completions_models(self) -> list[str]:
        return list(self._engines["chat"])

    def list_completions_models(self) -> list[str]:
        return list(self._engines["completion"])

    def run(self, token: CancellationToken) -> asyncio.Future[None]:
        """Serve from now on, until the token is cancelled; await the result for the end. Raises StartError."""
        return asyncio.ensure_future(self._run(token))

    async def _run(self, token: CancellationToken) -> None:
        host = os.environ.get("DYNAMO_HOST") or "127.0.0.1"
        server = HttpServer(create_app(self, api_keys=api_keys()), host, self.port)
        await server.start()
        log.info("OpenAI server: %s", server.url)
        try:
            await token.cancelled()
        finally:
            await server.stop()

    def _add(self, api: str, model: str, engine: HttpAsyncEngine) -> None:
        if model in self._engines[api]:
            raise ValueError(f"Model already exists: {model}")
        self._engines[api][model] = engine

    def _remove(self, api: str, model: str) -> None:
        if self._engines[api].pop(model, None) is None:
            raise ValueError(f"Model not found: {model}")

    # -- as the server's `Forwarder`

    def models(self) -> list[ServedModel]:
        found: dict[str, list[str]] = {}
        for api, engines in self._engines.items():
            for model in engines:
                found.setdefault(model, []).append(api)
        return [ServedModel(name, name, 0, self._created, tuple(apis), tuple(apis)) for name, apis in found.items()]

    def forward(self, api: str, request: dict[str, Any]) -> Stream[Any]:
        return Stream.from_iterator(self._chunks(self._engines[api][request["model"]], request))

    async def _chunks(self, engine: HttpAsyncEngine, request: dict[str, Any]) -> AsyncGenerator[Any]:
        chunks = engine.generate(request)
        if inspect.isawaitable(chunks):
            chunks = await chunks
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                yield chunk

    def instance_counts(self) -> dict[str, int]:
        return {model.name: 1 for model in self.models()}
