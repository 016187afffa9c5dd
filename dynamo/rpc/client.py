"""`Client`: calls to one endpoint, wherever its instances run."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import time
import uuid
from collections.abc import Collection
from functools import partial
from typing import Any

import msgspec

from dynamo import codec, context
from dynamo.errors import ConfigError, DynamoError, NoInstancesError, RequestError, TransportError, UnavailableError
from dynamo.rpc import frames
from dynamo.rpc.client_connection import ClientConnection, ClientStream
from dynamo.rpc.connection_pool import ConnectionPool, PooledConnection
from dynamo.rpc.load_balancer import lighter_of_two, lightest
from dynamo.rpc.messages import Instance, InstanceId, Request
from dynamo.rpc.remote_errors import Failure, unpack
from dynamo.streams import Channel, Reply, Stream
from dynamo.transport.nats import Nats

log = logging.getLogger(__name__)

ACK_TIMEOUT_S = 2.0
"""How long an instance may take to accept a request before another one is tried."""
ACK_BYTES_PER_S = 10e6
"""Lowest network speed assumed: a request's body must arrive before the instance can accept it."""
PATIENCE_S = 1.0
"""How long a call waits for an instance, or for NATS if requests go over it: a fast service restarts in that time."""
NAMED_PATIENCE_S = 0.2
"""The same for a named instance: the caller can name another one sooner."""
RETRY_PAUSE_S = 0.05
MIN_ATTEMPTS = 4
"""Number of attempts made even if `PATIENCE_S` has passed: instances may take long to refuse."""
_NIL = msgspec.Raw(codec.encode(None))

REQUEST_PLANE = "DYN_REQUEST_PLANE"

_decode_failure = msgspec.msgpack.Decoder(Failure).decode


def requests_over_nats() -> bool:
    """Return whether `DYN_REQUEST_PLANE` is nats. Raises ConfigError for an unknown value."""
    given = os.environ.get(REQUEST_PLANE) or "tcp"
    if given not in ("tcp", "nats"):
        raise ConfigError(
            f"{REQUEST_PLANE}={given}: unknown request plane",
            hint="tcp: over the connection that carries the response (the default); nats: over NATS",
        )
    return given == "nats"


class Client:
    """The instances of one endpoint and calls to them; created by `Runtime.client`.

    Requests go over the connection to their instance, or over NATS with `over_nats`.
    """

    def __init__(
        self, address: tuple[str, str, str], nats: Nats, connections: ConnectionPool, over_nats: bool = False
    ) -> None:
        self.address = address
        self.name = "/".join(address)
        self._nats = nats
        self._connections = connections
        self._over_nats = over_nats
        self._instances: dict[InstanceId, tuple[Instance, PooledConnection]] = {}
        self._ready: list[tuple[Instance, PooledConnection]] = []
        self._next = random.randrange(1 << 16)
        self._changed = asyncio.Event()
        self._opening: dict[asyncio.Task[None], Channel[Any]] = {}
        """calls that no instance has accepted yet"""
        self._closed = False
        connections.on_change(self._update)

    def join(self, instance: Instance) -> None:
        """Add an instance that discovery found; a second time for one that registered again."""
        known = self._instances.get(instance.id)
        pooled = known[1] if known is not None else self._connections.acquire(instance)
        self._instances[instance.id] = (instance, pooled)
        self._update()

    def leave(self, instance_id: InstanceId) -> None:
        """Remove an instance that deregistered or whose lease expired; its running streams continue."""
        if self._instances.pop(instance_id, None) is not None:
            self._connections.release(instance_id)
            self._update()

    def _update(self) -> None:
        self._ready = [known for known in self._instances.values() if known[1].available]
        self._changed.set()

    def instance_ids(self) -> list[int]:
        """Return the ids of the instances that can be called now."""
        return [instance.instance_id for instance, _ in self._ready]

    def request_types(self) -> set[str]:
        """Return the `Instance.request_type` of the instances that can be called now."""
        return {instance.request_type for instance, _ in self._ready}

    def in_flight(self) -> dict[int, int]:
        """Return this process's running calls, of all endpoints, by the id of each instance that can be called now."""
        return {instance.instance_id: pooled.in_flight for instance, pooled in self._ready}

    async def wait_for_instances(self, count: int = 1, timeout_s: float | None = None) -> list[int]:
        """Wait until `count` instances can be called. Raises NoInstancesError after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while len(self._ready) < count:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise NoInstancesError(
                f"{len(self._ready)} of {count} instances of {self.name} after {timeout_s} s"
            ) from None
        return self.instance_ids()

    def call(
        self,
        request: Any,
        choice: str | int,
        avoid: Collection[int] = (),
        *,
        decode: codec.Decode,
        streaming: bool,
    ) -> Stream[Any]:
        """Start a call; return a `Stream` of items or, for a unary endpoint, a `Reply`.

        `choice` is "round_robin", "random", "power_of_two" (the less busy of two random instances, by the calls of this
        process), "least_loaded" or an instance id. Instances in `avoid` are taken only when there is no other. A request
        may run twice where the first instance's acceptance was lost; the caller gets the items of one run only.
        """
        channel: Channel[Any] = Channel()
        task = asyncio.get_running_loop().create_task(self.send_with_retry(channel, request, choice, decode, avoid))
        self._opening[task] = channel
        task.add_done_callback(self._opening.pop)
        channel.on_cancel = task.cancel
        return (Stream if streaming else Reply)(channel, task)

    async def close(self) -> None:
        """Fail the calls that are being opened, and all later ones."""
        self._closed = True
        opening = dict(self._opening)
        for task, channel in opening.items():
            if task.cancel():  # False if it has just sent the request: then the response goes on
                channel.end(self._closed_error())
        await asyncio.gather(*opening, return_exceptions=True)

    async def send_with_retry(
        self, channel: Channel[Any], request: Any, choice: str | int, decode: codec.Decode, avoid: Collection[int]
    ) -> None:
        """Send a request to instances in turn until one accepts it; end `channel` with the error if none does.

        An instance that refuses is replaced by another, for `PATIENCE_S` and within the request's deadline; a named
        instance is not replaced.
        """
        give_up = time.monotonic() + (NAMED_PATIENCE_S if isinstance(choice, int) else PATIENCE_S)
        refused = set(map(InstanceId, avoid))
        failure: DynamoError | None = None
        try:
            if self._closed:
                raise self._closed_error()
            body = codec.encode(request)
            for attempt in itertools.count(1):
                left_s = context.time_left_s()
                try:
                    instance, pooled = await self._pick(choice, refused, give_up, left_s)
                    if self._over_nats:
                        await self._nats.wait_connected(min(give_up - time.monotonic(), left_s or PATIENCE_S))
                except (NoInstancesError, TransportError) as error:
                    raise failure or error from None
                connection = pooled.connection
                if connection is None:
                    continue  # lost meanwhile
                try:
                    await self._send(instance, connection, channel, body, decode, context.time_left_s())
                    return
                except (UnavailableError, TransportError) as error:
                    log.debug("%s: attempt %d at %x failed: %s", self.name, attempt, instance.id, error.message)
                    refused.add(instance.id)
                    failure = error
                    if attempt >= MIN_ATTEMPTS and time.monotonic() > give_up:
                        raise
        except Exception as error:
            channel.end(error)

    async def _send(
        self,
        instance: Instance,
        connection: ClientConnection,
        channel: Channel[Any],
        body: bytes,
        decode: codec.Decode,
        left_s: float | None,
    ) -> None:
        """Send to one instance; return when it has accepted.

        Raises the error it refused with, TransportError or WorkerLostError.
        """
        stream = connection.open_stream(decode, channel, left_s)
        channel.source = instance.id
        envelope = Request(
            id=context.request_id.get() or uuid.uuid4().hex,
            connection=connection.id,
            sid=stream.sid,
            timeout_s=left_s,
            body=msgspec.Raw(body),
        )
        timeout_s = ACK_TIMEOUT_S + len(body) / ACK_BYTES_PER_S
        if left_s is not None:
            timeout_s = min(timeout_s, left_s)
        try:
            if self._over_nats:
                await self._send_over_nats(instance, connection, stream, envelope, timeout_s)
            else:
                await connection.request(stream, instance.subject, envelope, timeout_s)
        except DynamoError:
            if not stream.accepted:  # with items here, only the acceptance was lost: a retry would repeat them
                connection.cancel_stream(stream)
                raise
        except BaseException as error:
            connection.cancel_stream(stream)
            if isinstance(error, ValueError):
                raise RequestError(f"{self.name}: {error}", hint="a request may have 256 MiB") from None
            raise
        stream.accepted = True
        channel.on_cancel = partial(connection.cancel_stream, stream)

    async def _send_over_nats(
        self,
        instance: Instance,
        connection: ClientConnection,
        stream: ClientStream,
        envelope: Request,
        timeout_s: float,
    ) -> None:
        payload = codec.encode(envelope)
        if len(payload) > self._nats.max_payload_bytes:
            connection.control(frames.BODY, (stream.sid, bytes(envelope.body)))
            envelope.body = _NIL
            envelope.body_ahead = True
            payload = codec.encode(envelope)
        answer = await self._nats.request(instance.subject, payload, timeout_s, stream.reply)
        if answer:
            raise unpack(_decode_failure(answer))

    async def _pick(
        self, choice: str | int, refused: set[InstanceId], give_up: float, left_s: float | None
    ) -> tuple[Instance, PooledConnection]:
        """Pick an instance, waiting until `give_up` for one; instances that refused are tried again after a pause.

        Raises NoInstancesError.
        """
        if left_s is not None:
            give_up = min(give_up, time.monotonic() + left_s)
        while True:
            if isinstance(choice, int):
                known = self._instances.get(InstanceId(choice))
                ready = [known] if known is not None and known[1].available else []
                if known is not None and known[1].stopping:
                    raise self._unavailable(choice)
            else:
                ready = self._ready
            if refused:
                ready = [known for known in ready if known[0].id not in refused]
            if ready:
                if choice == "random":
                    return random.choice(ready)
                if choice == "power_of_two":
                    return ready[lighter_of_two(ready)]
                self._next += 1
                if choice == "least_loaded":  # the next turn begins after it, so that idle instances share
                    self._next = lightest(ready, self._next % len(ready))
                return ready[self._next % len(ready)]
            wait_s = give_up - time.monotonic()
            if wait_s <= 0:
                raise self._unavailable(choice)
            self._changed.clear()
            try:
                async with asyncio.timeout(min(wait_s, RETRY_PAUSE_S) if refused else wait_s):
                    await self._changed.wait()
            except TimeoutError:
                refused.clear()

    def _unavailable(self, choice: str | int) -> NoInstancesError:
        if isinstance(choice, int):
            return NoInstancesError(
                f"instance {choice:x} of {self.name} is not available",
                hint=f"live: {', '.join(f'{i:x}' for i in self.instance_ids()) or 'none'}",
            )
        return NoInstancesError(
            f"no instance of {self.name} is available", hint="it is starting, restarting or was not deployed"
        )

    def _closed_error(self) -> UnavailableError:
        return UnavailableError(f"the client of {self.name} is closed", hint="this process is stopping")
