"""The server's side of a call, over an RPC connection or NATS: admit, decode, run, send.

`RpcServer` admits a request and decodes its argument; `ServerCall.run` calls the method and sends its items. A request
that is refused before `run` may be sent to another instance.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from dynamo import codec
from dynamo.context import request_id
from dynamo.errors import BadCallError, DynamoError, RequestError, TransportError, UnavailableError
from dynamo.rpc.messages import Request
from dynamo.rpc.remote_errors import pack
from dynamo.rpc.served_endpoint import ServedEndpoint, ServerCall
from dynamo.rpc.server_connection import ServerConnection, StreamListener
from dynamo.tasks import TaskSet
from dynamo.transport.nats import Nats

log = logging.getLogger(__name__)

QUEUE_GROUP = "q"

_decode_request = msgspec.msgpack.Decoder(Request).decode
Respond = Callable[[bytes], Awaitable[None]]


class RpcServer:
    """All endpoints of one process."""

    def __init__(self, nats: Nats, listener: StreamListener) -> None:
        self._nats = nats
        self._listener = listener
        self.endpoints: dict[str, ServedEndpoint] = {}  # by subject
        self.draining = False
        self._tasks = TaskSet("rpc server")
        self._idle = asyncio.Event()
        listener.on_request = self._on_request

    async def add(self, endpoint: ServedEndpoint) -> None:
        """Serve the endpoint. Requests may arrive before this returns."""
        self.endpoints[endpoint.subject] = endpoint

        async def handle(_: str, data: bytes, respond: Respond) -> None:
            try:
                request = _decode_request(data)
            except (msgspec.MsgspecError, ValueError) as error:  # a client of another version
                await respond(codec.encode(pack(RequestError(f"{endpoint.where}: bad envelope: {error}"))))
                return
            connection = self._listener.connections.get(request.connection)
            if connection is None or (request.body_ahead and not connection.has_body(request.sid)):
                # HELLO or the body is still on its way: do not block the requests behind this one
                self._tasks.spawn(self._on_nats_request(endpoint, request, respond), name="early request")
            else:
                await self._on_nats_request(endpoint, request, respond)

        await self._nats.subscribe(endpoint.subject, handle, queue=QUEUE_GROUP)

    def _on_request(self, connection: ServerConnection, subject: str, request: Request) -> None:
        """Handle a request that came over an RPC connection."""
        endpoint = self.endpoints.get(subject)
        try:
            if endpoint is None:
                raise UnavailableError(f"{subject} is not served here", hint="it is starting or was redeployed")
            self._admit(endpoint)
            argument = self._decode_argument(endpoint, request, request.body)
        except DynamoError as error:
            connection.refuse(request.sid, pack(error, endpoint.where if endpoint is not None else ""))
            return
        call = self._start_call(endpoint, request, connection)
        connection.accept(request.sid)
        try:
            call.run(argument)
        except Exception as error:  # must not end the other calls of this connection
            log.exception("%s failed", endpoint.where)
            call.stream.end(error, endpoint.where)

    async def _on_nats_request(self, endpoint: ServedEndpoint, request: Request, respond: Respond) -> None:
        """Handle a request that came over NATS: its acceptance goes back over NATS, its items over the connection."""
        try:
            connection = await self._listener.connection(request.connection)
            if connection is None:
                raise TransportError(f"{endpoint.where}: the client's RPC connection did not arrive")
            body: Any = await connection.receive_body(request.sid) if request.body_ahead else request.body
            if body is None:
                raise TransportError(f"{endpoint.where}: the request's body did not arrive")
            self._admit(endpoint)
            argument = self._decode_argument(endpoint, request, body)
        except DynamoError as error:
            await respond(codec.encode(pack(error, endpoint.where)))
            return
        call = self._start_call(endpoint, request, connection)
        try:
            await respond(b"")
        except Exception as error:
            call.cut(TransportError(f"{endpoint.where}: cannot answer over NATS: {error}"))
            return
        call.run(argument)

    def _admit(self, endpoint: ServedEndpoint) -> None:
        """Raise UnavailableError while draining."""
        if self.draining:
            raise UnavailableError(f"{endpoint.where} is stopping")

    def _decode_argument(self, endpoint: ServedEndpoint, request: Request, body: codec.Data) -> Any:
        """Return the method's argument.

        Raises BadCallError if the data does not fit the declared type: a bug of the calling service, logged here.
        A DynamoError that the type itself raises (in its `__post_init__`) is passed on: that is validation.
        """
        try:
            return endpoint.decode(body)
        except codec.DecodeError as error:
            raise self._bad_call(endpoint, request, error.message) from None
        except DynamoError as error:
            endpoint.requests += 1
            endpoint.count_error(error)
            raise
        except Exception as error:
            raise self._bad_call(endpoint, request, repr(error), exc_info=error) from error

    def _bad_call(
        self, endpoint: ServedEndpoint, request: Request, fact: str, exc_info: Exception | None = None
    ) -> BadCallError:
        error = BadCallError(f"{endpoint.method_name}: invalid request: {fact}")
        endpoint.requests += 1
        endpoint.count_error(error)
        in_request = contextvars.copy_context()
        in_request.run(request_id.set, request.id)
        in_request.run(log.error, "%s refused a call: %s", endpoint.where, error.message, exc_info=exc_info)
        return error

    def _start_call(self, endpoint: ServedEndpoint, request: Request, connection: ServerConnection) -> ServerCall:
        stream = connection.open_stream(request.sid)
        call = ServerCall(endpoint, request, stream, self._tasks, self._on_call_finished)
        if stream.closed:  # cancelled before it was accepted
            call.finish()
        else:
            endpoint.requests += 1
        return call

    def _on_call_finished(self) -> None:
        if self.draining and not self.active:
            self._idle.set()

    @property
    def active(self) -> int:
        """Number of running calls."""
        return sum(len(endpoint.running) for endpoint in self.endpoints.values())

    async def drain(self, limit_s: float) -> None:
        """Refuse new requests, announce that to all clients, and wait up to `limit_s` for the running calls."""
        self.draining = True
        self._listener.announce_stop()
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
        """Refuse new requests and cut the running calls."""
        self.draining = True
        for endpoint in self.endpoints.values():
            for call in list(endpoint.running):
                call.cut(UnavailableError("the service is stopping"))
        await self._tasks.aclose()
