"""The outermost layers of the server, plain ASGI: request ids, direct access to the connection, API keys."""

from __future__ import annotations

import hmac
import re
import uuid
from collections.abc import Collection
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynamo.context import request_id
from dynamo.errors import DynamoError
from dynamo.http.access_log import log_rejected
from dynamo.http.direct import Direct, respond_error

REQUEST_ID = "dynamo.request_id"
DIRECT = "dynamo.direct"

OPEN_PATHS = frozenset({"/", "/live", "/health", "/metrics", "/metrics/targets", "/docs", "/openapi.json"})
"""What probes, Prometheus and a browser's first visit need; none of it generates."""

_usable_id = re.compile(r"[\x21-\x7e]{1,128}").fullmatch


class AuthenticationError(DynamoError):
    """No API key, or a wrong one."""

    status = 401
    code = "invalid_api_key"


def header(scope: Scope, name: bytes) -> str:
    """The first header of that lower-case name; empty without one."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


class RequestIds:
    """Every answer carries `x-request-id`: the client's where it is usable in a header and a log, else a new one.

    Goes around everything else, so that it sees uvicorn's own `send`: the scope gets the connection for `sse.Events`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = header(scope, b"x-request-id")
        name = scope[REQUEST_ID] = given if _usable_id(given) else uuid.uuid4().hex
        scope[DIRECT] = Direct.of(send, scope)
        request_id.set(name)  # for this task, which ends with the request

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode("ascii"))]
            await send(message)

        await self._app(scope, receive, send_with_id)


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
        if self._known(key):
            await self._app(scope, receive, send)
            return
        text = "Incorrect API key provided." if key else "You did not provide an API key."
        error = AuthenticationError(text, hint="send it as Authorization: Bearer YOUR_KEY")
        log_rejected(f"{scope['method']} {scope['path']}", error)
        await respond_error(send, error, [(b"www-authenticate", b"Bearer")])

    def _known(self, key: str) -> bool:
        """All keys are compared, each in constant time, so that the time tells nothing of any."""
        given = key.encode("latin-1", "replace")
        return sum(hmac.compare_digest(given, known) for known in self._keys) > 0


def request_name(scope: Scope) -> str:
    """The request's id, where `RequestIds` is around the app."""
    name: Any = scope.get(REQUEST_ID)
    return str(name or uuid.uuid4().hex)
