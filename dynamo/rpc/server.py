"""The callee's side of a call: a request in, over the stream plane or NATS, the endpoint method run, its items out."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, field
from typing import Any

import msgspec

from dynamo import codec, context
from dynamo.context import request_id
from dynamo.errors import DeadlineError, DynamoError, RequestError, TransportError, UnavailableError
from dynamo.rpc.messages import Request
from dynamo.rpc.remote_errors import pack
from dynamo.rpc.server_connection import Outgoing, ServerConnection, StreamListener
from dynamo.streams import Stream
from dynamo.transport.nats import Nats

log = logging.getLogger(__name__)

QUEUE_GROUP = "q"

_decode_request = msgspec.msgpack.Decoder(Request).decode
Respond = Callable[[bytes], Awaitable[None]]


@dataclass
class Endpoint:
    """A method under an address. `method` gives an awaitable, an async iterator or a `Stream`."""

    address: tuple[str, str, str]
    """namespace, component, endpoint"""
    subject: str
    method: Callable[[Any], Any]
    decode: codec.Decode
    where: str
    """for error notes: `VllmWorker:1 generate`"""
    stats_data: Callable[[], Mapping[str, Any]] | None = None
    """what the service says of itself in `$SRV.STATS`"""
    requests: int = 0
    errors: int = 0
    last_error: str = ""
    processing_s: float = 0.0
    running: set[Call] = field(default_factory=set)

    def failed(self, error: BaseException) -> None:
        self.errors += 1
        self.last_error = pack(error).message


class Call:
    """One request that was accepted: the method's run and the stream that takes its items to the caller."""

    __slots__ = ("_context", "_server", "_started", "_stop", "_timer", "endpoint", "outgoing")

    def __init__(self, server: Server, endpoint: Endpoint, request: Request, outgoing: Outgoing) -> None:
        self.endpoint, self.outgoing = endpoint, outgoing
        self._server = server
        self._started = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._stop: Callable[[], Any] | None = None
        self._context = contextvars.copy_context()
        self._context.run(request_id.set, request.id)
        if request.timeout_s is None:
            self._context.run(context.deadline.set, None)
        else:
            self._context.run(context.deadline.set, self._started + request.timeout_s)
            self._timer = asyncio.get_running_loop().call_later(request.timeout_s, self._expire)
        outgoing.on_cancel = self.cut
        endpoint.running.add(self)

    def run(self, argument: Any) -> None:
        """Call the method. A `Stream` that it gives costs no task: its items are piped."""
        if self not in self.endpoint.running:
            return  # cut before it began
        try:
            self._take(self._context.run(self.endpoint.method, argument))
        except Exception as error:
            self.finish(error)

    def _take(self, result: Any) -> None:
        if isinstance(result, Stream):
            self._stop = result.cancel
            self.outgoing.on_read = result.consumed
            result.pipe(self.outgoing.send, self.finish, counted=False)
        elif inspect.isawaitable(result):
            work = result if inspect.iscoroutine(result) else _wait_for(result)
            self._spawn(work, self._returned)
        elif isinstance(result, AsyncIterable):
            self._spawn(self._send_all(result), self._ended)
        else:
            found = type(result).__name__
            raise TypeError(f"{self.endpoint.where} returned a {found}, not an async iterator or awaitable")

    def _spawn(self, work: Coroutine[Any, Any, Any], done: Callable[[asyncio.Task[Any]], None]) -> None:
        task = self._server.spawn(work, self._context)
        task.add_done_callback(done)
        self._stop = task.cancel

    def _returned(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and task.exception() is None:
            self.outgoing.send(task.result())
        self._ended(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self.finish(UnavailableError("the call was cancelled") if task.cancelled() else task.exception())

    async def _send_all(self, items: AsyncIterable[Any]) -> None:
        outgoing = self.outgoing
        async with aclosing(items) if isinstance(items, AsyncGenerator) else nullcontext():
            async for item in items:
                outgoing.send(item)
                if outgoing.full:
                    await outgoing.room()
                if outgoing.closed:
                    return

    def _expire(self) -> None:
        self.cut(DeadlineError(f"{self.endpoint.where} did not finish within the request's deadline"))

    def cut(self, error: Exception | None = None) -> None:
        """End it before its time; `error` goes to the caller if it is still there."""
        self.finish(error)
        stop, self._stop = self._stop, None
        if stop is not None:
            try:
                stop()
            except Exception:  # the endpoint's own on_cancel
                log.exception("%s: cancelling failed", self.endpoint.where)

    def finish(self, error: BaseException | None = None) -> None:
        """The end, whatever brought it about; a second one does nothing."""
        endpoint = self.endpoint
        if self not in endpoint.running:
            return
        endpoint.running.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        taken_s = time.monotonic() - self._started
        endpoint.processing_s += taken_s
        if error is not None:
            endpoint.failed(error)
            if not isinstance(error, DynamoError):
                self._tell(logging.ERROR, "%s failed: %r", endpoint.where, error, exc_info=error)
        if log.isEnabledFor(logging.DEBUG):
            self._tell(logging.DEBUG, "%s ended in %.3f s: %s", endpoint.where, taken_s, error or "ok")
        self.outgoing.end(error, endpoint.where)
        self._server.ended()

    def _tell(self, level: int, text: str, *facts: object, exc_info: BaseException | None = None) -> None:
        """Log with the request's id. In a copy of the context: the call's own may be entered now."""
        self._context.copy().run(log.log, level, text, *facts, exc_info=exc_info)


class Server:
    """All endpoints of one process."""

    def __init__(self, nats: Nats, listener: StreamListener) -> None:
        self._nats, self._listener = nats, listener
        listener.on_request = self._asked
        self.endpoints: dict[str, Endpoint] = {}  # by subject
        self.draining = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._idle = asyncio.Event()

    async def add(self, endpoint: Endpoint) -> None:
        """Take requests on the endpoint's subject; they may arrive before this returns."""
        self.endpoints[endpoint.subject] = endpoint

        async def handle(_: str, data: bytes, respond: Respond) -> None:
            try:
                request = _decode_request(data)
            except (msgspec.MsgspecError, ValueError) as error:  # a caller of another version
                await respond(codec.encode(pack(RequestError(f"{endpoint.where}: bad envelope: {error}"))))
                return
            connection = self._listener.connections.get(request.connection)
            if connection is None or (request.body_ahead and not connection.has_body(request.sid)):
                # something is still on its way; other requests must not wait behind it
                self.spawn(self._accept(endpoint, request, respond))
            else:
                await self._accept(endpoint, request, respond)

        await self._nats.subscribe(endpoint.subject, handle, queue=QUEUE_GROUP)

    @property
    def active(self) -> int:
        """Calls that are running."""
        return sum(len(endpoint.running) for endpoint in self.endpoints.values())

    async def drain(self, limit_s: float) -> None:
        """Refuse new requests, tell the callers, and wait until the running ones are done, at most `limit_s`."""
        self.draining = True
        self._listener.bye()
        if self.active and limit_s > 0:
            log.info("draining: %d requests are running", self.active)
            self._idle.clear()
            try:
                async with asyncio.timeout(limit_s):
                    await self._idle.wait()
            except TimeoutError:
                log.warning("draining: gave up on %d requests after %.0f s", self.active, limit_s)
        await self.close()

    async def close(self) -> None:
        """Cut what runs."""
        self.draining = True
        for endpoint in self.endpoints.values():
            for call in list(endpoint.running):
                call.cut(UnavailableError("the service is stopping"))
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def ended(self) -> None:
        if self.draining and not self.active:
            self._idle.set()

    def spawn(self, work: Coroutine[Any, Any, Any], context: contextvars.Context | None = None) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _accept(self, endpoint: Endpoint, request: Request, respond: Respond) -> None:
        try:
            connection = await self._listener.connection(request.connection)
            if connection is None:
                raise TransportError(f"{endpoint.where}: the caller's stream connection did not arrive")
            body: Any = await connection.body(request.sid) if request.body_ahead else request.body
            if body is None:
                raise TransportError(f"{endpoint.where}: the request's body did not arrive")
            argument = self._admit(endpoint, body)
        except DynamoError as error:
            await respond(codec.encode(pack(error, endpoint.where)))
            return
        call = self._begin(endpoint, request, connection)
        try:
            await respond(b"")
        except Exception as error:
            call.cut(TransportError(f"{endpoint.where}: cannot answer over NATS: {error}"))
            return
        call.run(argument)

    def _asked(self, connection: ServerConnection, subject: str, request: Request) -> None:
        """A request over the stream plane."""
        endpoint = self.endpoints.get(subject)
        try:
            if endpoint is None:
                raise UnavailableError(f"{subject} is not served here", hint="it is starting, or was deployed anew")
            argument = self._admit(endpoint, request.body)
        except DynamoError as error:
            connection.refuse(request.sid, pack(error, endpoint.where if endpoint is not None else ""))
            return
        call = self._begin(endpoint, request, connection)
        connection.accept(request.sid)
        try:
            call.run(argument)
        except Exception as error:  # what others have on this connection must not suffer
            log.exception("%s failed", endpoint.where)
            call.outgoing.end(error, endpoint.where)

    def _begin(self, endpoint: Endpoint, request: Request, connection: ServerConnection) -> Call:
        call = Call(self, endpoint, request, connection.open(request.sid))
        if call.outgoing.closed:
            call.finish()
        else:
            endpoint.requests += 1
        return call

    def _admit(self, endpoint: Endpoint, body: codec.Data) -> Any:
        """The method's argument. Raises what the request is refused with."""
        if self.draining:
            raise UnavailableError(f"{endpoint.where} is stopping")
        try:
            return endpoint.decode(body)
        except Exception as error:
            endpoint.requests += 1
            endpoint.failed(error)
            if isinstance(error, DynamoError):
                raise
            log.exception("%s: the request's type failed", endpoint.where)  # a __post_init__ of its own
            raise RequestError(f"{endpoint.where}: invalid request: {error!r}") from error


async def _wait_for(result: Awaitable[Any]) -> Any:
    return await result
