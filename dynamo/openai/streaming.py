"""Answers on an ASGI connection: a stream as server-sent events, or one JSON body.

Headers and the end of a stream go through ASGI. The chunks between are written straight to uvicorn's transport from the
callback that brings a token: 10 to 12 µs a chunk, 5 of them the kernel's, where an ASGI `send` takes 25 to 40. Where the
server is not uvicorn they go through `send`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Receive, Send

from dynamo.errors import EngineError
from dynamo.http import errors
from dynamo.http.direct import Direct, Headers, respond_error, respond_json
from dynamo.llm.protocol import Delta
from dynamo.openai.metrics import Observation, Status
from dynamo.openai.responses import Answer, merged
from dynamo.streams import Stream

SLOW_RETRY_S = 0.05
MERGE_ABOVE = 64
"""Deltas kept for a slow client before they are merged into one for each choice; later an eighth of the tokens that wait,
so that the copying stays in proportion to the text."""
SILENCE_S = 10.0
"""After this long without a token the headers are sent, then a comment each time, so that proxies do not give up."""

SSE_HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Whole:
    """One answer as one JSON body: reads the stream of deltas, notices when the client leaves."""

    def __init__(self, receive: Receive, send: Send, stream: Stream[Delta], answer: Answer, seen: Observation) -> None:
        self._receive, self._send = receive, send
        self._stream, self._answer, self._observation = stream, answer, seen
        self._finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._error: BaseException | None = None
        self._left = False

    async def run(self) -> None:
        async with self._reading():
            await self._finished
            if self._left:
                return
            self._check_complete()
            if self._error is not None:
                await respond_error(self._send, self._error)
            else:
                await respond_json(self._send, 200, self._answer.whole(), [])

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[None]:
        """The stream is read and the client watched inside; however it ends, the stream does too and is counted."""
        watch = asyncio.get_running_loop().create_task(self._watch_client())
        try:
            self._stream.pipe(self._item, self._end)
            yield
        except asyncio.CancelledError:  # the server stops and waits no longer
            self._left = self._left or not self._finished.done()
            raise
        finally:
            self._stream.cancel()
            watch.cancel()
            self._record()

    async def _watch_client(self) -> None:
        """uvicorn reports a disconnect here, and ends this wait when the response is complete."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._leave()

    def _leave(self) -> None:
        if not self._finished.done():
            self._left = True
            self._stream.cancel()
            self._finish()

    def _item(self, delta: Delta) -> None:
        self._observation.tokens(len(delta.token_ids))
        self._answer.add(delta)

    def _end(self, error: BaseException | None) -> None:
        self._error = error
        self._finish()

    def _check_complete(self) -> None:
        """To be called when all deltas are in the answer."""
        if self._error is None and not self._answer.complete:
            self._error = EngineError("the answer ended before it was complete")

    def _finish(self) -> None:
        if not self._finished.done():
            self._finished.set_result(None)

    def _record(self) -> None:
        answer, error = self._answer, self._error
        if self._left:
            error = None
        status: Status = "disconnect" if self._left else "error" if error is not None else "success"
        self._observation.done(status, answer.prompt_tokens, answer.output_tokens, answer.cached_tokens, error)


class Events(Whole):
    """One answer as server-sent events. An error before the first delta still gets a status code of its own."""

    def __init__(
        self,
        receive: Receive,
        send: Send,
        stream: Stream[Delta],
        answer: Answer,
        seen: Observation,
        direct: Direct | None,
    ) -> None:
        super().__init__(receive, send, stream, answer, seen)
        self._direct = direct
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()  # `run` has something to do
        self._waiting: list[Delta] = []  # deltas that could not be written yet
        self._merge_above = MERGE_ABOVE
        self._open = False  # the headers are out
        self._retry: asyncio.TimerHandle | None = None
        self._silence: asyncio.TimerHandle | None = None
        self._heard = seen.heard

    async def run(self) -> None:
        async with self._reading():
            self._silence = self._loop.call_later(SILENCE_S, self._break_silence)
            try:
                await self._news.wait()
                if self._left:
                    return
                if self._finished.done() and not self._waiting:
                    self._check_complete()
                if self._error is not None and not self._waiting:
                    await respond_error(self._send, self._error)
                    return
                await self._headers()
                await (self._write_through() if self._direct is None else self._write_directly(self._direct))
                if not self._left:
                    await self._close()
            finally:
                self._silence.cancel()
                if self._retry is not None:
                    self._retry.cancel()

    async def _headers(self) -> None:
        if self._direct is not None:
            self._direct.before_headers()
        await self._send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})

    async def _write_directly(self, direct: Direct) -> None:
        """From here to the end, `_item` writes by itself. Nothing is awaited before, or a later delta could go first."""
        direct.write(self._answer.opening() + self._take_waiting())
        self._open = True
        await self._finished
        if not self._left and not direct.closed:
            direct.write(self._last())

    async def _write_through(self) -> None:
        chunk = self._answer.opening()
        self._open = True
        while True:
            self._news.clear()
            chunk += self._take_waiting()
            if self._finished.done():
                break
            if chunk:
                await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
                chunk = b""
            await self._news.wait()
        if not self._left:
            await self._send({"type": "http.response.body", "body": chunk + self._last(), "more_body": True})

    def _last(self) -> bytes:
        rest = self._take_waiting()
        self._check_complete()
        if self._error is not None:
            return rest + b"data: " + errors.body(self._error) + b"\n\n"
        return rest + self._answer.closing()

    async def _close(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    # -- callbacks: none of them waits

    def _item(self, delta: Delta) -> None:
        self._observation.tokens(len(delta.token_ids))
        direct = self._direct
        if direct is None or not self._open:
            self._keep(delta)
            self._news.set()
        elif direct.closed:  # uvicorn tells nobody where a pipelined request waits behind this one
            self._leave()
        elif self._waiting or direct.behind:
            self._keep(delta)
            if self._retry is None:
                self._retry = self._loop.call_later(SLOW_RETRY_S, self._catch_up, direct)
        else:
            direct.write(self._answer.chunk(delta))

    def _finish(self) -> None:
        super()._finish()
        self._news.set()

    def _keep(self, delta: Delta) -> None:
        self._waiting.append(delta)
        if len(self._waiting) > self._merge_above + self._answer.choices:
            self._waiting = merged(self._waiting)
            self._merge_above = max(MERGE_ABOVE, sum(len(kept.token_ids) for kept in self._waiting) // 8)

    def _take_waiting(self) -> bytes:
        waiting, self._waiting, self._merge_above = self._waiting, [], MERGE_ABOVE
        if len(waiting) > 2 * self._answer.choices:
            waiting = merged(waiting)
        return b"".join(map(self._answer.chunk, waiting))

    def _catch_up(self, direct: Direct) -> None:
        """Write what a slow client missed, as soon as it has read what it had."""
        self._retry = None
        if self._finished.done():
            return  # `run` writes the rest
        if direct.closed:
            self._leave()
        elif direct.behind:
            self._retry = self._loop.call_later(SLOW_RETRY_S, self._catch_up, direct)
        else:
            direct.write(self._take_waiting())

    def _break_silence(self) -> None:
        self._silence = self._loop.call_later(SILENCE_S, self._break_silence)
        if self._observation.heard == self._heard and not self._finished.done():
            self._news.set()
            if self._open and self._direct is not None and not self._direct.closed and not self._waiting:
                self._direct.write(b": waiting\n\n")
        self._heard = self._observation.heard
