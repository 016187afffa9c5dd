"""Connections of this process to the processes that it calls: one each, opened when they join, kept until they leave."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import weakref
from collections.abc import Callable

from dynamo.errors import ConfigError, TransportError
from dynamo.rpc import heartbeat
from dynamo.rpc.client_connection import ClientConnection, connect
from dynamo.rpc.messages import Instance, InstanceId
from dynamo.transport.network import ADVERTISED, STREAM_PORTS, host_id, is_loopback, same_network

log = logging.getLogger(__name__)

RETRY_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SILENCE_S = 5.0
SILENCE_VARIABLE = "DYN_PEER_SILENCE_S"
UNREACHED_S = 5.0
"""How long a process on another host may be out of reach before that is told: its host may just have ended."""
TELL_AGAIN_S = 600.0


def silence_s() -> float:
    """How long a process may show no sign of life before what it answers is taken for lost; 0: for ever."""
    given = os.environ.get(SILENCE_VARIABLE, "")
    try:
        value = float(given or SILENCE_S)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{SILENCE_VARIABLE}={given}: not a number of seconds", hint="unset it, or give 0 for never")
    return value


class UnreachableHosts:
    """Tells of hosts that cannot be reached: in one line for all processes of a host, and rarely again."""

    def __init__(self) -> None:
        self._told: dict[str, float] = {}

    def tell(self, instance: Instance, fact: str, hint: str) -> None:
        now, host = time.monotonic(), instance.host
        if now - self._told.get(host, -TELL_AGAIN_S) >= TELL_AGAIN_S:
            self._told[host] = now
            name = f"{instance.namespace}/{instance.component}"
            log.warning("%s %x, on another host, cannot be reached: %s; %s", name, instance.id, fact, hint)

    def reached(self, instance: Instance) -> None:
        if self._told.pop(instance.host, None) is not None:
            log.info("%s/%s %x is reached now", instance.namespace, instance.component, instance.id)


class Peer:
    """One process that may be called. `available` while connected and not stopping."""

    def __init__(
        self, instance: Instance, on_change: Callable[[], None], silence_s: float, unreached: UnreachableHosts
    ) -> None:
        self.id = instance.id
        self.instance = instance
        self.connection: ClientConnection | None = None
        self.stopping = False
        self._on_change, self._silence_s, self._unreached = on_change, silence_s, unreached
        self._elsewhere = bool(instance.host) and not same_network(instance.host)
        self._missed_since: float | None = None
        self._watch: heartbeat.Watch | None = None
        self._lost = asyncio.Event()
        self.task = asyncio.get_running_loop().create_task(self._keep(), name=f"peer {instance.id:x}")

    @property
    def available(self) -> bool:
        return self.connection is not None and self.connection.alive and not self.stopping

    @property
    def in_flight(self) -> int:
        """Calls of this process that run there: sent, and neither ended, cancelled nor refused."""
        return 0 if self.connection is None else len(self.connection.incoming)

    async def _keep(self) -> None:
        """Connect, and again whenever the connection is lost, as long as the instance is registered."""
        if self._elsewhere and is_loopback(self.instance.streams.get("tcp", "").rpartition(":")[0]):
            self._unreached.tell(
                self.instance,
                f"it says {self.instance.streams['tcp']}, which is its own loopback",
                f"there, set NATS_SERVER to nats://<an address of the NATS host>:4222, not localhost, or {ADVERTISED}",
            )
            return  # another process of this host may listen there
        failures = 0
        while True:
            self._lost.clear()
            started = time.monotonic()
            try:
                self._watch = await self._watch_it()
                self.connection = await self._connect()
                self._on_change()
                await self._lost.wait()
                if time.monotonic() - started > RETRY_S[-1]:
                    failures = 0
            except TransportError as error:
                log.debug("%s/%s %x: %s", self.instance.component, self.instance.endpoint, self.id, error)
            self.connection = None
            self._unwatch()
            await asyncio.sleep(RETRY_S[min(failures, len(RETRY_S) - 1)])
            failures += 1

    async def _connect(self) -> ClientConnection:
        same_host = self.instance.host == host_id()
        try:
            connection = await connect(
                self.instance.streams,
                self.instance.key,
                same_host=same_host,
                on_lost=self._on_lost,
                on_bye=self._on_bye,
            )
        except TransportError as error:
            now = time.monotonic()
            self._missed_since = self._missed_since or now
            if self._elsewhere and now - self._missed_since >= UNREACHED_S:
                ports = f"{STREAM_PORTS[0]}-{STREAM_PORTS[-1]}"
                self._unreached.tell(
                    self.instance, error.message.rpartition(": ")[2], f"open its TCP ports {ports} to this host"
                )
            raise
        self._missed_since = None
        self._unreached.reached(self.instance)
        return connection

    async def _watch_it(self) -> heartbeat.Watch | None:
        """Before the connection, which the kernel accepts for a stopped process too. Raises TransportError."""
        address = self.instance.streams.get("pulse")
        if address is None or not self._silence_s:
            return None
        return await heartbeat.watch(address, self._silence_s, self._on_silent)

    def _unwatch(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()

    def _on_silent(self) -> None:
        if self.connection is None:
            return
        if self.connection.alive:
            log.warning(
                "%s %x shows no sign of life for %g s: what it was answering is lost",
                self.instance.component, self.id, self._silence_s,
            )  # fmt: skip
        self.connection.abort()  # a closing one too, which waits for what was written to be taken

    def _on_lost(self, connection: ClientConnection) -> None:
        self._lost.set()  # if it is lost before `connect` returned it, `_keep` sees that then
        if self.connection is connection:
            self.connection = None
            self._unwatch()
            self._on_change()

    def _on_bye(self) -> None:
        self.stopping = True
        self._on_change()

    def retire(self) -> None:
        """Open no more connections; streams that still run on the present one finish, then it closes."""
        self.task.cancel()
        if self.connection is not None:
            self.connection.retire()
        else:
            self._unwatch()

    async def close(self) -> None:
        """Close the connection; what runs on it ends with WorkerLostError."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self._unwatch()
        if self.connection is not None:
            self.connection.abort()


class ConnectionPool:
    """All peers, shared by the clients of a process: several endpoints of one process share its connection."""

    def __init__(self) -> None:
        self._peers: dict[InstanceId, tuple[Peer, int]] = {}
        self._retired: weakref.WeakSet[Peer] = weakref.WeakSet()
        self._listeners: list[Callable[[], None]] = []
        self._silence_s = silence_s()
        self._unreached = UnreachableHosts()

    def on_change(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()

    def join(self, instance: Instance) -> Peer:
        peer, users = self._peers.get(instance.id, (None, 0))
        if peer is None:
            peer = Peer(instance, self._changed, self._silence_s, self._unreached)
        self._peers[instance.id] = (peer, users + 1)
        return peer

    def leave(self, instance_id: InstanceId) -> None:
        peer, users = self._peers.pop(instance_id)
        if users > 1:
            self._peers[instance_id] = (peer, users - 1)
        else:
            peer.retire()
            self._retired.add(peer)  # its connection refers to it while it lives

    async def close(self) -> None:
        peers = [*(peer for peer, _ in self._peers.values()), *self._retired]
        self._peers.clear()
        await asyncio.gather(*(peer.close() for peer in peers))
