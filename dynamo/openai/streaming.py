"""Writers of responses on an ASGI connection: a stream as server-sent events, or one JSON body.

The headers and the end of a stream go through ASGI. The chunks between are written straight to uvicorn's transport, from
the callback that brings a token: 10 to 12 µs a chunk, 5 of them the kernel's, where an ASGI `send` takes 25 to 40. Under
servers other than uvicorn they go through `send`.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Receive, Send

from dynamo.errors import EngineError
from dynamo.http import errors
from dynamo.http.access_log import Outcome
from dynamo.http.direct import DirectConnection, Headers, respond_error, respond_json
from dynamo.llm.protocol import Delta
from dynamo.openai.backlog import Backlog
from dynamo.openai.metrics import RequestTracker
from dynamo.openai.responses import ResponseBuilder
from dynamo.streams import Stream

SLOW_RETRY_S = 0.05
SILENCE_S = 10.0
"""After so long without a token the headers are sent, then a comment each time, so that proxies do not time out."""
COMMENT = b": waiting\n\n"

SSE_HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class ResponseWriter(ABC):
    """Reads the stream of deltas of one request, watches for the client's disconnect, and records the outcome.

    `_ended` is set once, by whichever comes first: the end of the stream, with `_error` if it failed, or the client's
    disconnect, with `_disconnected`.
    """

    def __init__(
        self,
        receive: Receive,
        send: Send,
        stream: Stream[Delta],
        builder: ResponseBuilder,
        tracker: RequestTracker,
    ) -> None:
        self._receive = receive
        self._send = send
        self._stream = stream
        self._builder = builder
        self._tracker = tracker
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._error: BaseException | None = None
        self._disconnected = False

    @abstractmethod
    async def run(self) -> None:
        """Write the response. Returns when it is complete or the client has disconnected."""

    @abstractmethod
    def _on_delta(self, delta: Delta) -> None: ...

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[None]:
        """Read the stream and watch the client inside the block; after it, cancel both and record the outcome."""
        watcher = asyncio.get_running_loop().create_task(self._watch_client())
        try:
            self._stream.pipe(self._on_delta, self._on_end)
            yield
        except asyncio.CancelledError:  # the server stops and does not wait for the response
            if not self._ended.done():
                self._disconnected = True
            raise
        finally:
            self._stream.cancel()
            watcher.cancel()
            self._record()

    async def _watch_client(self) -> None:
        """Wait until uvicorn reports a disconnect. It ends this wait, too, when the response is complete."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._on_disconnect()

    def _on_disconnect(self) -> None:
        if not self._ended.done():
            self._disconnected = True
            self._stream.cancel()
            self._set_ended()

    def _on_end(self, error: BaseException | None) -> None:
        self._error = error
        self._set_ended()

    def _set_ended(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    def _check_complete(self) -> None:
        """Set the error of a stream that ended too early. To be called when the builder has all deltas."""
        if self._error is None and not self._builder.complete:
            self._error = EngineError("the answer ended before it was complete")

    def _record(self) -> None:
        error = None if self._disconnected else self._error
        outcome: Outcome = "success" if error is None else "error"
        if self._disconnected:
            outcome = "disconnect"
        builder = self._builder
        self._tracker.finish(outcome, builder.prompt_tokens, builder.output_tokens, builder.cached_tokens, error)


class JsonResponseWriter(ResponseWriter):
    """Writes a response as one JSON body."""

    async def run(self) -> None:
        async with self._reading():
            await self._ended
            if self._disconnected:
                return
            self._check_complete()
            if self._error is not None:
                await respond_error(self._send, self._error)
            else:
                await respond_json(self._send, 200, self._builder.body(), [])

    def _on_delta(self, delta: Delta) -> None:
        self._tracker.on_tokens(len(delta.token_ids))
        self._builder.add(delta)


class EventStreamWriter(ResponseWriter):
    """Writes a response as server-sent events. It goes through these states:

    1. Nothing is sent, deltas wait in the backlog. An error before the first delta gets a status code of its own.
    2. The headers are sent. `_on_delta` writes to `_live`, uvicorn's connection, and to the backlog while the client is
       slow. Without such a connection, `_live` stays None, and `run` sends the backlog whenever `_wake` is set.
    3. The stream has ended or the client has disconnected (`_ended`): `run` writes the rest.
    """

    def __init__(
        self,
        receive: Receive,
        send: Send,
        stream: Stream[Delta],
        builder: ResponseBuilder,
        tracker: RequestTracker,
        direct: DirectConnection | None,
    ) -> None:
        super().__init__(receive, send, stream, builder, tracker)
        self._loop = asyncio.get_running_loop()
        self._direct = direct
        self._live: DirectConnection | None = None
        self._backlog = Backlog(builder.choices, builder.merge)
        self._wake = asyncio.Event()
        self._retry_timer: asyncio.TimerHandle | None = None
        self._silence_timer: asyncio.TimerHandle | None = None
        self._last_token_at = 0.0  # at the previous tick of the silence timer

    async def run(self) -> None:
        async with self._reading():
            self._silence_timer = self._loop.call_later(SILENCE_S, self._on_silence_timer)
            try:
                await self._wake.wait()  # for a delta, the end, or a long silence
                if self._disconnected:
                    return
                if self._ended.done() and not self._backlog.deltas:
                    self._check_complete()
                    if self._error is not None:
                        await respond_error(self._send, self._error)
                        return
                if self._direct is None:
                    await self._send_headers()
                    await self._write_through_send()
                else:
                    self._direct.prepare_headers()
                    await self._send_headers()
                    await self._write_directly(self._direct)
                if not self._disconnected:
                    await self._send({"type": "http.response.body", "body": b"", "more_body": False})
            finally:
                self._silence_timer.cancel()
                if self._retry_timer is not None:
                    self._retry_timer.cancel()

    async def _send_headers(self) -> None:
        await self._send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})

    async def _write_directly(self, direct: DirectConnection) -> None:
        direct.write(self._builder.opening() + self._take_backlog())
        self._live = direct  # with no await since the write above, or a later delta could overtake
        await self._ended
        if not self._disconnected and not direct.closed:
            direct.write(self._last_events())

    async def _write_through_send(self) -> None:
        chunk = self._builder.opening()
        while True:
            self._wake.clear()
            chunk += self._take_backlog()
            if self._ended.done():
                break
            if chunk:
                await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
                chunk = b""
            await self._wake.wait()
        if not self._disconnected:
            await self._send({"type": "http.response.body", "body": chunk + self._last_events(), "more_body": True})

    def _take_backlog(self) -> bytes:
        return b"".join(map(self._builder.chunk, self._backlog.take()))

    def _last_events(self) -> bytes:
        rest = self._take_backlog()
        self._check_complete()
        if self._error is not None:
            return rest + b"data: " + errors.body(self._error) + b"\n\n"
        return rest + self._builder.closing()

    # -- callbacks: none of them waits

    def _on_delta(self, delta: Delta) -> None:
        self._tracker.on_tokens(len(delta.token_ids))
        live = self._live
        if live is None:
            self._backlog.add(delta)
            self._wake.set()
        elif live.closed:  # uvicorn reports no disconnect while a pipelined request waits behind this one
            self._on_disconnect()
        elif self._backlog.deltas or live.slow:
            self._backlog.add(delta)
            if self._retry_timer is None:
                self._retry_timer = self._loop.call_later(SLOW_RETRY_S, self._on_retry_timer, live)
        else:
            live.write(self._builder.chunk(delta))

    def _set_ended(self) -> None:
        super()._set_ended()
        self._wake.set()

    def _on_retry_timer(self, live: DirectConnection) -> None:
        """Write the backlog once a slow client has read what it had."""
        self._retry_timer = None
        if self._ended.done():
            return  # `run` writes the rest
        if live.closed:
            self._on_disconnect()
        elif live.slow:
            self._retry_timer = self._loop.call_later(SLOW_RETRY_S, self._on_retry_timer, live)
        else:
            live.write(self._take_backlog())

    def _on_silence_timer(self) -> None:
        """Send the headers, or a comment, if there was no token since the last tick."""
        self._silence_timer = self._loop.call_later(SILENCE_S, self._on_silence_timer)
        if self._tracker.last_token_at == self._last_token_at and not self._ended.done():
            self._wake.set()
            live = self._live
            if live is not None and not live.closed and not self._backlog.deltas:
                live.write(COMMENT)
        self._last_token_at = self._tracker.last_token_at
