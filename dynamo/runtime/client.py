"""Calls to one endpoint, wherever its instances run."""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from typing import Any

import msgspec

from dynamo import log
from dynamo.errors import DeadlineError, DynamoError, NoInstancesError, TransportError, UnavailableError
from dynamo.runtime.peers import Peer, Peers
from dynamo.transport.nats import Nats
from dynamo.wire import codec, frames, scope
from dynamo.wire.failure import Failure, unpack
from dynamo.wire.messages import Instance, InstanceId, Request
from dynamo.wire.stream import Channel, Reply, Stream

logger = logging.getLogger(__name__)

ACK_TIMEOUT_S = 2.0
"""How long an instance may take to accept a request before another one is tried."""
WAIT_FOR_INSTANCE_S = 1.0
"""How long a call waits when no instance is available, which bridges the restart of a quick service."""
TRIES = 4
_ENVELOPE_BYTES = 512
_NIL = msgspec.Raw(codec.encode(None))

_decode_failure = msgspec.msgpack.Decoder(Failure).decode


class Client:
    """The instances of one endpoint and calls to them; made by `DistributedRuntime.client`."""

    def __init__(self, address: tuple[str, str, str], nats: Nats, peers: Peers) -> None:
        self.address = address
        self._nats, self._peers = nats, peers
        self._instances: dict[InstanceId, tuple[Instance, Peer]] = {}
        self._next = random.randrange(1 << 16)
        self._changed = asyncio.Event()
        self._opening: set[asyncio.Task[None]] = set()
        peers.on_change(self._changed.set)

    @property
    def name(self) -> str:
        return "/".join(self.address)

    def join(self, instance: Instance) -> None:
        """Called by discovery; a second time for an instance that registered again."""
        known = self._instances.get(instance.id)
        peer = known[1] if known is not None else self._peers.join(instance)
        self._instances[instance.id] = (instance, peer)
        self._changed.set()

    def leave(self, instance_id: InstanceId) -> None:
        """Called by discovery when the instance deregistered or its lease ended."""
        if self._instances.pop(instance_id, None) is not None:
            self._peers.leave(instance_id)
            self._changed.set()

    def instance_ids(self) -> list[int]:
        """Ids of the instances that can be called now."""
        return [i for i, (_, peer) in self._instances.items() if peer.available]

    async def wait_for_instances(self, count: int = 1, timeout_s: float | None = None) -> list[int]:
        """Wait until `count` instances can be called. Raises NoInstancesError after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while len(self.instance_ids()) < count:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise NoInstancesError(
                f"{len(self.instance_ids())} of {count} instances of {self.name} after {timeout_s} s"
            ) from None
        return self.instance_ids()

    def call(self, request: Any, choice: str | int, decode: codec.Decode, *, streaming: bool) -> Stream[Any]:
        """Send a request; the result is a `Stream` of items or, for a unary endpoint, a `Reply`.

        `choice` is "round_robin", "random" or an instance id. An instance that does not accept is replaced by another
        one, up to `TRIES` times and within the request's deadline; an instance that is named is not replaced.
        """
        channel: Channel[Any] = Channel()
        task = asyncio.get_running_loop().create_task(self._open(channel, request, choice, decode))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)
        channel.on_cancel = task.cancel  # type: ignore[assignment]  # its result does not matter
        return (Stream if streaming else Reply)(channel, task)

    async def _open(self, channel: Channel[Any], request: Any, choice: str | int, decode: codec.Decode) -> None:
        try:
            body = codec.encode(request)
            refused: set[InstanceId] = set()
            for attempt in range(TRIES):
                left = scope.time_left_s()
                try:
                    if await self._send(channel, body, choice, decode, left, refused):
                        break
                except (UnavailableError, TransportError) as error:
                    if attempt == TRIES - 1 or isinstance(choice, int) or channel.done:
                        raise
                    logger.debug("%s: try %d: %s", self.name, attempt + 1, error)
            if left is not None and not channel.done:
                self._expire(channel, left)
        except asyncio.CancelledError:
            channel.cancel()
            raise
        except Exception as error:
            channel.end(error)

    def _expire(self, channel: Channel[Any], left_s: float) -> None:
        """The callee keeps the deadline too; this is for one that hangs."""

        def expired() -> None:
            if not channel.done:
                cancel = channel.on_cancel
                channel.end(DeadlineError(f"no answer from {self.name} within the request's deadline"))
                cancel()

        asyncio.get_running_loop().call_later(left_s + 0.1, expired)

    async def _send(
        self,
        channel: Channel[Any],
        body: bytes,
        choice: str | int,
        decode: codec.Decode,
        left_s: float | None,
        refused: set[InstanceId],
    ) -> bool:
        instance, peer = await self._pick(choice, left_s, refused)
        connection = peer.connection
        if connection is None:
            return False
        incoming = connection.receive(decode, channel)
        large = len(body) > self._nats.max_payload_bytes - _ENVELOPE_BYTES
        if large:
            connection.control(frames.BODY, (incoming.sid, body))
        envelope = Request(
            id=log.request_id.get() or uuid.uuid4().hex,
            peer=self._peers.own_id,
            sid=incoming.sid,
            timeout_s=left_s,
            body=_NIL if large else msgspec.Raw(body),
            body_ahead=large,
        )
        try:
            answer = await self._nats.request(
                instance.subject, codec.encode(envelope), min(ACK_TIMEOUT_S, left_s or ACK_TIMEOUT_S)
            )
            if answer:
                raise unpack(_decode_failure(answer))
            if incoming.lost:
                raise TransportError(f"lost the connection to {self.name} while it accepted the request")
        except DynamoError:
            connection.forget(incoming.sid)
            refused.add(instance.id)
            raise
        incoming.accepted = True
        return True

    async def _pick(self, choice: str | int, left_s: float | None, refused: set[InstanceId]) -> tuple[Instance, Peer]:
        give_up = time.monotonic() + min(WAIT_FOR_INSTANCE_S, left_s or WAIT_FOR_INSTANCE_S)
        while True:
            if isinstance(choice, int):
                known = self._instances.get(InstanceId(choice))
                if known is not None and known[1].available:
                    return known
            else:
                ready = [k for k in self._instances.values() if k[1].available]
                ready = [k for k in ready if k[0].id not in refused] or ready
                if ready:
                    if choice == "random":
                        return random.choice(ready)
                    self._next += 1
                    return ready[self._next % len(ready)]
            left = give_up - time.monotonic()
            if left <= 0:
                raise self._nobody(choice)
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except TimeoutError:
                raise self._nobody(choice) from None

    def _nobody(self, choice: str | int) -> NoInstancesError:
        if isinstance(choice, int):
            return NoInstancesError(
                f"instance {choice:x} of {self.name} is not available",
                hint=f"live: {', '.join(f'{i:x}' for i in self.instance_ids()) or 'none'}",
            )
        return NoInstancesError(
            f"no instance of {self.name} is available", hint="it is starting, restarting or was not deployed"
        )
