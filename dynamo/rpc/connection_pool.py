"""Connections of this process to the processes that it calls: opened when they join, kept until they leave."""

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
from dynamo.tasks import TaskSet
from dynamo.transport.network import ADVERTISED, STREAM_PORTS, host_id, is_loopback, same_network

log = logging.getLogger(__name__)

RECONNECT_PAUSES_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SILENCE_S = 5.0
SILENCE_VARIABLE = "DYN_PEER_SILENCE_S"
UNREACHABLE_S = 5.0
"""How long a process on another host may be unreachable before that is logged: its host may have just been stopped."""
LOG_INTERVAL_S = 600.0


def silence_s() -> float:
    """Return how long a process may send no heartbeat before its running responses are given up; 0: unlimited.

    Raises ConfigError for a value of `DYN_PEER_SILENCE_S` that is not a number of seconds.
    """
    given = os.environ.get(SILENCE_VARIABLE, "")
    try:
        value = float(given or SILENCE_S)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{SILENCE_VARIABLE}={given}: not a number of seconds", hint="unset it, or give 0 for never")
    return value


class UnreachableHosts:
    """Logs unreachable hosts: once for all processes of a host, and again after LOG_INTERVAL_S."""

    def __init__(self) -> None:
        self._logged_at: dict[str, float] = {}

    def log_unreachable(self, instance: Instance, reason: str, hint: str) -> None:
        """Log that the instance's host cannot be reached, unless that was logged within LOG_INTERVAL_S."""
        now = time.monotonic()
        if now - self._logged_at.get(instance.host, -LOG_INTERVAL_S) >= LOG_INTERVAL_S:
            self._logged_at[instance.host] = now
            name = f"{instance.namespace}/{instance.component}"
            log.warning("%s %x, on another host, cannot be reached: %s; %s", name, instance.id, reason, hint)

    def log_reached(self, instance: Instance) -> None:
        """Log that the instance is connected, if its host was logged as unreachable."""
        if self._logged_at.pop(instance.host, None) is not None:
            log.info("connected to %s/%s %x", instance.namespace, instance.component, instance.id)


class PooledConnection:
    """The connection to one process, reopened whenever it is lost. `available` while connected and not stopping."""

    def __init__(
        self,
        instance: Instance,
        on_change: Callable[[], None],
        silence_s: float,
        unreachable: UnreachableHosts,
        tasks: TaskSet,
    ) -> None:
        self.id = instance.id
        self.instance = instance
        self.connection: ClientConnection | None = None
        self.stopping = False
        """the process has asked for no new requests"""
        self._on_change = on_change
        self._silence_s = silence_s
        self._unreachable = unreachable
        self._on_other_host = bool(instance.host) and not same_network(instance.host)
        self._unreachable_since: float | None = None
        self._monitor: heartbeat.HeartbeatMonitor | None = None
        self._lost = asyncio.Event()
        self._task = tasks.spawn(self._keep_connected(), name=f"{instance.id:x}")

    @property
    def available(self) -> bool:
        """True if a call can be sent now."""
        return self.connection is not None and self.connection.alive and not self.stopping

    @property
    def in_flight(self) -> int:
        """Calls of this process that run there: sent, and neither ended, cancelled nor refused."""
        return 0 if self.connection is None else len(self.connection.streams)

    async def _keep_connected(self) -> None:
        """Connect, and again whenever the connection is lost, until cancelled."""
        if self._on_other_host and is_loopback(self.instance.streams.get("tcp", "").rpartition(":")[0]):
            self._unreachable.log_unreachable(
                self.instance,
                f"it advertises {self.instance.streams['tcp']}, its own loopback",
                f"there, set NATS_SERVER to nats://<an address of the NATS host>:4222, not localhost, or {ADVERTISED}",
            )
            return  # connecting might reach another process, of this host
        failures = 0
        while True:
            self._lost.clear()
            started = time.monotonic()
            try:
                self._monitor = await self._start_monitor()
                self.connection = await self._connect()
                self._on_change()
                await self._lost.wait()
                if time.monotonic() - started > RECONNECT_PAUSES_S[-1]:
                    failures = 0
            except TransportError as error:
                log.debug("%s/%s %x: %s", self.instance.component, self.instance.endpoint, self.id, error)
            self.connection = None
            self._stop_monitor()
            await asyncio.sleep(RECONNECT_PAUSES_S[min(failures, len(RECONNECT_PAUSES_S) - 1)])
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
            self._unreachable_since = self._unreachable_since or now
            if self._on_other_host and now - self._unreachable_since >= UNREACHABLE_S:
                ports = f"{STREAM_PORTS[0]}-{STREAM_PORTS[-1]}"
                reason = error.message.rpartition(": ")[2]
                self._unreachable.log_unreachable(self.instance, reason, f"open its TCP ports {ports} to this host")
            raise
        self._unreachable_since = None
        self._unreachable.log_reached(self.instance)
        return connection

    async def _start_monitor(self) -> heartbeat.HeartbeatMonitor | None:
        """Monitor the process's heartbeat, before connecting: the kernel accepts connections of a stopped process too.

        None if that is switched off or not possible. Raises TransportError for a stopped process.
        """
        address = self.instance.streams.get("pulse")
        if address is None or not self._silence_s:
            return None
        return await heartbeat.monitor(address, self._silence_s, self._on_silent)

    def _stop_monitor(self) -> None:
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None

    def _on_silent(self) -> None:
        if self.connection is None:
            return
        if self.connection.alive:
            log.warning(
                "no heartbeat from %s %x for %g s: its in-flight responses are lost",
                self.instance.component, self.id, self._silence_s,
            )  # fmt: skip
        self.connection.abort()  # a closing one too, which waits until the process has read what was written

    def _on_lost(self, connection: ClientConnection) -> None:
        self._lost.set()  # if lost before `connect` returned it, `_keep_connected` sees that when it waits
        if self.connection is connection:
            self.connection = None
            self._stop_monitor()
            self._on_change()

    def _on_bye(self) -> None:
        self.stopping = True
        self._on_change()

    def retire(self) -> None:
        """Stop reconnecting, and close once the running streams have ended."""
        self._task.cancel()
        if self.connection is not None:
            self.connection.retire()
        else:
            self._stop_monitor()

    async def close(self) -> None:
        """Close the connection. Running streams end with WorkerLostError."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._stop_monitor()
        if self.connection is not None:
            self.connection.abort()


class ConnectionPool:
    """All connections of a process, shared by its clients: the endpoints of one process are called over one connection."""

    def __init__(self) -> None:
        self._connections: dict[InstanceId, tuple[PooledConnection, int]] = {}
        """with the number of clients that use each"""
        self._retired: weakref.WeakSet[PooledConnection] = weakref.WeakSet()
        self._listeners: list[Callable[[], None]] = []
        self._silence_s = silence_s()
        self._unreachable = UnreachableHosts()
        self._tasks = TaskSet("connection")

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever a connection becomes available or unavailable."""
        self._listeners.append(listener)

    def _notify_change(self) -> None:
        for listener in self._listeners:
            listener()

    def acquire(self, instance: Instance) -> PooledConnection:
        """Return the connection to the instance's process, opened at the first call. `release` it."""
        pooled, users = self._connections.get(instance.id, (None, 0))
        if pooled is None:
            pooled = PooledConnection(instance, self._notify_change, self._silence_s, self._unreachable, self._tasks)
        self._connections[instance.id] = (pooled, users + 1)
        return pooled

    def release(self, instance_id: InstanceId) -> None:
        """Give a connection back. When its last user does, it closes once its running streams have ended."""
        pooled, users = self._connections.pop(instance_id)
        if users > 1:
            self._connections[instance_id] = (pooled, users - 1)
        else:
            pooled.retire()
            self._retired.add(pooled)  # its ClientConnection keeps it alive while that is open

    async def close(self) -> None:
        """Close all connections."""
        connections = [*(pooled for pooled, _ in self._connections.values()), *self._retired]
        self._connections.clear()
        await asyncio.gather(*(pooled.close() for pooled in connections))
