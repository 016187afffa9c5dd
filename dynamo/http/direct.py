"""Responses without the web framework: bytes written straight to uvicorn's connection, and complete JSON bodies."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Scope, Send

from dynamo.http import errors

SLOW_BYTES = 64 << 10
"""Unsent bytes above which a client counts as slow: its deltas are merged until it has read."""

Headers = list[tuple[bytes, bytes]]

JSON_HEADERS: Headers = [(b"content-type", b"application/json")]


class DirectConnection:
    """uvicorn's connection behind an ASGI `send`, to write body chunks to without `send`'s cost."""

    __slots__ = ("_chunked", "_cycle", "_transport")

    def __init__(self, cycle: Any, *, chunked: bool) -> None:
        self._cycle = cycle
        self._chunked = chunked
        self._transport: asyncio.Transport = cycle.transport

    @classmethod
    def of(cls, send: Send, scope: Scope) -> DirectConnection | None:
        """Return the connection; None where a middleware has wrapped `send`, and under servers other than uvicorn."""
        cycle = getattr(send, "__self__", None)
        if getattr(cycle, "transport", None) is None or not hasattr(cycle, "chunked_encoding"):
            return None
        return cls(cycle, chunked=scope["http_version"] != "1.0")

    def prepare_headers(self) -> None:
        """Turn chunked encoding off for HTTP/1.0 clients, which do not know it: closing the connection ends their body.

        uvicorn does not do so by itself. To be called before the headers are sent.
        """
        if not self._chunked:
            self._cycle.chunked_encoding = False

    @property
    def closed(self) -> bool:
        return self._transport.is_closing()

    @property
    def slow(self) -> bool:
        return self._transport.get_write_buffer_size() > SLOW_BYTES

    def write(self, data: bytes) -> None:
        """Write one chunk of the body. No-op for empty data, since an empty chunk would end the body."""
        if data:
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)


async def respond_json(send: Send, status: int, body: bytes, headers: Headers) -> None:
    """Send a complete JSON response."""
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": status, "headers": [*JSON_HEADERS, length, *headers]})
    await send({"type": "http.response.body", "body": body})


async def respond_error(send: Send, error: BaseException, headers: Headers | None = None) -> None:
    """Send a complete error response."""
    found = [*errors.headers(error), *(headers or ())]
    await respond_json(send, errors.status_of(error), errors.body(error), found)
