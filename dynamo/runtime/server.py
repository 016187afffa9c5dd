"""The callee's side of a call: requests from NATS in, the endpoint method run, its items out on the stream plane."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec

from dynamo.errors import DeadlineError, DynamoError, RequestError, TransportError, UnavailableError
from dynamo.log import request_id
from dynamo.transport.nats import Nats
from dynamo.transport.stream import WINDOW_ITEMS, Outgoing, StreamListener
from dynamo.wire import codec, scope
from dynamo.wire.failure import pack
from dynamo.wire.messages import Request
from dynamo.wire.stream import Stream

log = logging.getLogger(__name__)

QUEUE_GROUP = "q"

_decode_request = msgspec.msgpack.Decoder(Request).decode
Respond = Callable[[bytes], Awaitable[None]]


@dataclass
class Endpoint:
    """A method under an address. `method` gives an awaitable, an async iterator or a `Stream`."""

    name: str
    method: Callable[[Any], Any]
    decode: codec.Decode
    where: str
    """for error notes: `VllmWorker:1 generate`"""
    requests: int = 0
    errors: int = 0
    processing_s: float = 0.0
    in_flight: dict[int, Outgoing] = field(default_factory=dict)


class Server:
    """All endpoints of one process."""

    def __init__(self, nats: Nats, listener: StreamListener) -> None:
        self._nats, self._listener = nats, listener
        self.endpoints: dict[str, Endpoint] = {}
        self.draining = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()

    async def add(self, endpoint: Endpoint, subject: str) -> None:
        """Take requests on `subject`; they may arrive before this returns."""
        self.endpoints[endpoint.name] = endpoint

        async def handle(data: bytes, respond: Respond) -> None:
            try:
                request = _decode_request(data)
            except msgspec.MsgspecError as error:  # a caller of another version
                await respond(codec.encode(pack(RequestError(f"{endpoint.where}: bad envelope: {error}"))))
                return
            if request.peer in self._listener.connections:
                await self._accept(endpoint, request, respond)
            else:  # its HELLO is still on the way; others must not wait behind it
                self._spawn(self._accept(endpoint, request, respond))

        await self._nats.subscribe(subject, handle, queue=QUEUE_GROUP)

    @property
    def active(self) -> int:
        """Calls that are running."""
        return sum(len(e.in_flight) for e in self.endpoints.values())

    async def drain(self, limit_s: float) -> None:
        """Refuse new requests, tell the callers, and wait until the running ones are done, at most `limit_s`."""
        self.draining = True
        self._listener.bye()
        self._idle.clear()
        if self.active:
            log.info("draining: %d requests are running", self.active)
            try:
                await asyncio.wait_for(self._idle.wait(), limit_s)
            except TimeoutError:
                log.warning("draining: gave up on %d requests after %.0f s", self.active, limit_s)
        for endpoint in self.endpoints.values():
            for outgoing in list(endpoint.in_flight.values()):
                outgoing.end(UnavailableError("the service is stopping"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Any, context: contextvars.Context | None = None) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _accept(self, endpoint: Endpoint, request: Request, respond: Respond) -> None:
        try:
            if self.draining:
                raise UnavailableError(f"{endpoint.where} is stopping")
            connection = await self._listener.connection(request.peer)
            if connection is None:
                raise TransportError(f"{endpoint.where}: the caller's stream connection did not arrive")
            body: bytes | msgspec.Raw | None = request.body
            if request.body_ahead:
                body = connection.bodies.pop(request.sid, None)
            if body is None:
                raise TransportError(f"{endpoint.where}: the request's body did not arrive")
            argument = endpoint.decode(body)
        except DynamoError as error:
            endpoint.errors += 1
            await respond(codec.encode(pack(error, endpoint.where)))
            return
        await respond(b"")
        outgoing = connection.open(request.sid)
        if outgoing.closed:
            return
        endpoint.requests += 1
        key = id(outgoing)
        endpoint.in_flight[key] = outgoing
        started = time.monotonic()
        timer: asyncio.TimerHandle | None = None

        def finish(error: BaseException | None = None) -> None:
            if timer is not None:
                timer.cancel()
            if endpoint.in_flight.pop(key, None) is None:
                return
            endpoint.processing_s += time.monotonic() - started
            if error is not None:
                endpoint.errors += 1
                if not isinstance(error, DynamoError):
                    log.error("%s failed: %r", endpoint.where, error, exc_info=error)
            outgoing.end(error, endpoint.where)
            if self.draining and not self.active:
                self._idle.set()

        context = contextvars.copy_context()
        context.run(request_id.set, request.id)
        context.run(scope.deadline.set, None if request.timeout_s is None else started + request.timeout_s)
        cancel = self._run(endpoint, argument, outgoing, finish, context)

        def cancelled() -> None:
            cancel()
            finish()

        outgoing.on_cancel = cancelled
        if request.timeout_s is not None and key in endpoint.in_flight:

            def expired() -> None:
                finish(DeadlineError(f"{endpoint.where} did not finish within the request's deadline"))
                cancel()

            timer = asyncio.get_running_loop().call_later(request.timeout_s, expired)

    def _run(
        self,
        endpoint: Endpoint,
        argument: Any,
        outgoing: Outgoing,
        finish: Callable[[BaseException | None], None],
        context: contextvars.Context,
    ) -> Callable[[], Any]:
        """Start the method; how to cancel it comes back. A `Stream` costs no task: its items are piped."""
        try:
            result = context.run(endpoint.method, argument)
        except Exception as error:
            finish(error)
            return lambda: None
        if isinstance(result, Stream):
            result.pipe(outgoing.send, finish)
            return result.cancel
        if inspect.isawaitable(result):
            return self._spawn(_unary(result, outgoing, finish), context).cancel
        if hasattr(result, "__aiter__"):
            return self._spawn(_generate(result, outgoing, finish), context).cancel
        finish(TypeError(f"{endpoint.where} returned a {type(result).__name__}, not an async iterator or awaitable"))
        return lambda: None


async def _unary(result: Awaitable[Any], outgoing: Outgoing, finish: Callable[[BaseException | None], None]) -> None:
    try:
        outgoing.send(await result)
    except asyncio.CancelledError:
        finish(UnavailableError("the call was cancelled"))
        raise
    except Exception as error:
        finish(error)
    else:
        finish(None)


async def _generate(
    items: AsyncIterator[Any], outgoing: Outgoing, finish: Callable[[BaseException | None], None]
) -> None:
    try:
        if isinstance(items, AsyncGenerator):
            async with aclosing(items):
                await _send_all(items, outgoing)
        else:
            await _send_all(items, outgoing)
    except asyncio.CancelledError:
        finish(UnavailableError("the call was cancelled"))
        raise
    except Exception as error:
        finish(error)
    else:
        finish(None)


async def _send_all(items: AsyncIterator[Any], outgoing: Outgoing) -> None:
    async for item in items:
        outgoing.send(item)
        if outgoing._ahead >= WINDOW_ITEMS:
            await outgoing.room()
        if outgoing.closed:
            return
