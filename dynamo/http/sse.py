"""Answers on an ASGI connection: a stream as server-sent events, or one JSON body.

Headers and the end of a stream go through ASGI. The chunks between are written straight to uvicorn's transport from the
callback that brings a token: 10 to 12 µs a chunk, 5 of them the kernel's, where an ASGI `send` takes 25 to 40. Where the
server is not uvicorn they go through `send`, from a queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

from starlette.types import Receive, Send

from dynamo.http import failure
from dynamo.http.answer import Answer, merged
from dynamo.http.metrics import Observation
from dynamo.llm.protocol import Delta
from dynamo.wire.stream import Channel, Stream

SLOW_BYTES = 64 << 10
"""Unsent bytes above which a client counts as slow: its deltas are merged until it has read."""
SLOW_RETRY_S = 0.05
FIRST_BYTE_S = 10.0
"""After this long without a token the headers are sent, so that proxies do not give up on a long prefill."""

Headers = list[tuple[bytes, bytes]]

SSE_HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
JSON_HEADERS: Headers = [(b"content-type", b"application/json")]


def direct_transport(send: Send) -> asyncio.Transport | None:
    """uvicorn's transport behind an ASGI `send` that no middleware has wrapped; None for other servers."""
    return getattr(getattr(send, "__self__", None), "transport", None)


async def respond_json(send: Send, status: int, body: bytes, headers: Headers) -> None:
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": status, "headers": [*JSON_HEADERS, length, *headers]})
    await send({"type": "http.response.body", "body": body})


async def respond_error(send: Send, error: BaseException, headers: Headers) -> None:
    await respond_json(send, failure.status_of(error), failure.body(error), [*failure.headers(error), *headers])


class Reading:
    """One answer in the making: reads the stream of deltas, notices when the client leaves."""

    def __init__(
        self,
        receive: Receive,
        send: Send,
        stream: Stream[Delta],
        answer: Answer,
        observation: Observation,
        headers: Headers,
    ) -> None:
        self._receive, self._send, self._headers = receive, send, headers
        self._stream, self._answer, self._observation = stream, answer, observation
        self._loop = asyncio.get_running_loop()
        self._finished: asyncio.Future[None] = self._loop.create_future()
        self._error: BaseException | None = None
        self._left = False

    async def _watch_client(self) -> None:
        """uvicorn reports a disconnect here, and ends this wait when the response is complete."""
        while True:
            message: MutableMapping[str, Any] = await self._receive()
            if message["type"] == "http.disconnect":
                break
        if not self._finished.done():
            self._left = True
            self._stream.cancel()
            self._finished.set_result(None)

    def _end(self, error: BaseException | None) -> None:
        self._error = error
        if not self._finished.done():
            self._finished.set_result(None)

    def _record(self) -> None:
        status = "disconnect" if self._left else "error" if self._error is not None else "success"
        answer = self._answer
        self._observation.done(status, answer.prompt_tokens, answer.output_tokens, answer.cached_tokens)


class Whole(Reading):
    """The answer as one JSON body."""

    def _item(self, delta: Delta) -> None:
        self._observation.token()
        self._answer.add(delta)

    async def run(self) -> None:
        watch = self._loop.create_task(self._watch_client())
        try:
            self._stream.pipe(self._item, self._end)
            await self._finished
            if self._left:
                return
            if self._error is not None:
                await respond_error(self._send, self._error, self._headers)
            else:
                await respond_json(self._send, 200, self._answer.whole(), self._headers)
        finally:
            self._stream.cancel()
            watch.cancel()
            self._record()


class Events(Reading):
    """The answer as server-sent events."""

    def __init__(
        self,
        receive: Receive,
        send: Send,
        stream: Stream[Delta],
        answer: Answer,
        observation: Observation,
        headers: Headers,
        *,
        transport: asyncio.Transport | None,
        choices: int,
    ) -> None:
        super().__init__(receive, send, stream, answer, observation, headers)
        self._transport, self._choices = transport, choices
        self._first: asyncio.Future[None] = self._loop.create_future()
        self._waiting: list[Delta] = []  # deltas that could not be written yet
        self._open = False
        self._retry: asyncio.TimerHandle | None = None
        self._more: asyncio.Event | None = None  # set when `send` has something to do

    def _item(self, delta: Delta) -> None:
        self._observation.token()
        if not self._open or self._waiting:
            self._waiting.append(delta)
            self._begin()
        elif self._transport is None:
            self._waiting.append(delta)
            if self._more is not None:
                self._more.set()
        elif self._transport.get_write_buffer_size() > SLOW_BYTES:
            self._waiting.append(delta)
            self._retry = self._loop.call_later(SLOW_RETRY_S, self._catch_up)
        else:
            chunk = self._answer.chunk(delta)
            if chunk:
                self._transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))

    def _begin(self) -> None:
        if not self._first.done():
            self._first.set_result(None)

    def _end(self, error: BaseException | None) -> None:
        super()._end(error)
        self._begin()
        if self._more is not None:
            self._more.set()

    def _catch_up(self) -> None:
        """Write what a slow client missed, as soon as it has read what it had."""
        if self._transport is None or self._transport.is_closing() or self._finished.done():
            return
        if self._transport.get_write_buffer_size() > SLOW_BYTES:
            self._waiting = merged(self._waiting)
            self._retry = self._loop.call_later(SLOW_RETRY_S, self._catch_up)
            return
        chunk = self._take_waiting()
        if chunk:
            self._transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))

    def _take_waiting(self) -> bytes:
        waiting, self._waiting = self._waiting, []
        if len(waiting) > 2 * self._choices:
            waiting = merged(waiting)
        return b"".join(map(self._answer.chunk, waiting))

    async def run(self) -> None:
        watch = self._loop.create_task(self._watch_client())
        timer = self._loop.call_later(FIRST_BYTE_S, self._begin)
        try:
            self._stream.pipe(self._item, self._end)
            await self._first
            if self._error is not None and not self._waiting:
                await respond_error(self._send, self._error, self._headers)
                return
            await self._send({"type": "http.response.start", "status": 200, "headers": [*SSE_HEADERS, *self._headers]})
            await self._body(self._answer.opening(self._choices) + self._take_waiting())
            if self._transport is None:
                await self._send_as_they_come()
            else:
                # what came during the sends above goes first, then the callback writes by itself
                chunk = self._take_waiting()
                self._open = True
                if chunk:
                    await self._body(chunk)
            await self._finished
            if not self._left:
                last = self._take_waiting()
                if self._error is not None:
                    last += b"data: " + failure.body(self._error) + b"\n\n"
                else:
                    last += self._answer.closing()
                await self._send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            timer.cancel()
            if self._retry is not None:
                self._retry.cancel()
            self._stream.cancel()
            watch.cancel()
            self._record()

    async def _send_as_they_come(self) -> None:
        self._open, self._more = True, asyncio.Event()
        while not self._finished.done():
            chunk = self._take_waiting()
            if chunk:
                await self._body(chunk)
            await self._more.wait()
            self._more.clear()

    async def _body(self, body: bytes) -> None:
        if body:
            await self._send({"type": "http.response.body", "body": body, "more_body": True})


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
        delta.index += offset
        out.push(delta)

    for i, stream in enumerate(streams):
        stream.pipe(lambda delta, offset=i * choices: add(offset, delta), end)  # type: ignore[misc]
    return Stream(out)
