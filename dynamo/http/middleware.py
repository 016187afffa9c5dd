"""The outermost layers of a server, plain ASGI: request ids, the last resort for exceptions, and API keys."""

from __future__ import annotations

import hmac
import re
import time
import uuid
from collections.abc import Collection
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynamo.context import request_id
from dynamo.errors import DynamoError
from dynamo.http.access_log import log_rejected
from dynamo.http.direct import DirectConnection, respond_error

REQUEST_ID = "dynamo.request_id"
DIRECT = "dynamo.direct"
ARRIVED_AT = "dynamo.arrived_at"

OPEN_PATHS = frozenset({"/", "/live", "/health", "/metrics", "/metrics/targets", "/docs", "/openapi.json"})
"""Paths that need no API key: for probes, Prometheus and a browser's first visit. None of them generates."""

_usable_id = re.compile(r"[\x21-\x7e]{1,128}").fullmatch


class AuthenticationError(DynamoError):
    """The API key is missing or wrong."""

    status = 401
    code = "invalid_api_key"


def header(scope: Scope, name: bytes) -> str:
    """Return the first header of that lower-case name; empty without one."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


class RequestIds:
    """Adds `x-request-id` to every response: the client's if it is usable in a header and a log, else a new one.

    The outermost layer of every application, which has two more consequences. It sees uvicorn's own `send` and puts the
    connection into the scope, for the writer of server-sent events. And exceptions that reach it would be answered by
    uvicorn in plain text, so it logs them with the place and answers in JSON.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = header(scope, b"x-request-id")
        name = scope[REQUEST_ID] = given if _usable_id(given) else uuid.uuid4().hex
        scope[DIRECT] = DirectConnection.of(send, scope)
        scope[ARRIVED_AT] = time.monotonic()
        request_id.set(name)  # for this task, which ends with the request
        status: int | None = None  # None: the response has not started
        completed = False

        async def send_with_id(message: Message) -> None:
            nonlocal status, completed
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode("ascii"))]
            elif not message.get("more_body"):
                completed = True
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            place = f"{scope['method']} {scope['path']}"
            if (
                status is not None and not completed
            ):  # uvicorn logs it and closes the connection, so that the client notices
                error.add_note(f"while answering {place}")
                raise
            log_rejected(place, error, elapsed_s(scope), status=status)
            if status is None:
                await respond_error(send_with_id, error)


class ApiKeys:
    """Refuses requests without one of the keys, as `Authorization: Bearer <key>` or `api-key: <key>`."""

    def __init__(self, app: ASGIApp, keys: Collection[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        scheme, _, token = header(scope, b"authorization").partition(" ")
        key = (token.strip() if scheme.lower() == "bearer" else "") or header(scope, b"api-key")
        if self._is_known(key):
            await self._app(scope, receive, send)
            return
        text = "Incorrect API key provided." if key else "You did not provide an API key."
        error = AuthenticationError(text, hint="send it as Authorization: Bearer YOUR_KEY")
        log_rejected(f"{scope['method']} {scope['path']}", error, elapsed_s(scope))
        await respond_error(send, error, [(b"www-authenticate", b"Bearer")])

    def _is_known(self, key: str) -> bool:
        """Compare with all keys, each in constant time, so that the response time reveals nothing about them."""
        given = key.encode("latin-1", "replace")
        return sum(hmac.compare_digest(given, known) for known in self._keys) > 0


def request_name(scope: Scope) -> str:
    """Return the request's id, a new one where the application runs without `RequestIds`."""
    name: Any = scope.get(REQUEST_ID)
    return str(name or uuid.uuid4().hex)


def elapsed_s(scope: Scope) -> float:
    """Return the seconds since the request arrived; 0 where the application runs without `RequestIds`."""
    arrived_at: float | None = scope.get(ARRIVED_AT)
    return 0.0 if arrived_at is None else time.monotonic() - arrived_at
