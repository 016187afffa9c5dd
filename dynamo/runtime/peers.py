"""Connections of this process to the processes that it calls: one each, opened when they join, kept until they leave."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from pathlib import Path

from dynamo.errors import TransportError
from dynamo.transport import stream
from dynamo.transport.stream import CallerConnection
from dynamo.wire.messages import Instance, InstanceId

log = logging.getLogger(__name__)

RETRY_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def host_id() -> str:
    """The same for all processes of one running kernel: a unix socket may be reachable between them."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{uuid.getnode():x}"


class Peer:
    """One process that may be called. `available` while connected and not stopping."""

    def __init__(self, instance: Instance, own_id: str, on_change: Callable[[], None]) -> None:
        self.id = instance.id
        self.instance = instance
        self.connection: CallerConnection | None = None
        self.stopping = False
        self._own_id, self._on_change = own_id, on_change
        self._task = asyncio.get_running_loop().create_task(self._keep(), name=f"peer {instance.id:x}")
        self._lost = asyncio.Event()

    @property
    def available(self) -> bool:
        return self.connection is not None and not self.stopping

    async def _keep(self) -> None:
        """Connect, and again whenever the connection is lost, as long as the instance is registered."""
        attempt = 0
        same_host = self.instance.host == host_id()
        while True:
            self._lost.clear()
            try:
                self.connection = await stream.connect(
                    self.instance.streams,
                    self._own_id,
                    same_host=same_host,
                    on_lost=self._on_lost,
                    on_bye=self._on_bye,
                )
            except TransportError as error:
                log.debug("%s/%s %x: %s", self.instance.component, self.instance.endpoint, self.id, error)
                await asyncio.sleep(RETRY_S[min(attempt, len(RETRY_S) - 1)])
                attempt += 1
                continue
            attempt = 0
            self._on_change()
            await self._lost.wait()

    def _on_lost(self, connection: CallerConnection) -> None:
        if self.connection is connection:
            self.connection = None
        self._lost.set()
        self._on_change()

    def _on_bye(self) -> None:
        self.stopping = True
        self._on_change()

    def close(self) -> None:
        """Open no more connections; streams that still run on the present one finish."""
        self._task.cancel()
        if self.connection is not None and not self.connection.incoming:
            self.connection.close()


class Peers:
    """All peers, shared by the clients of a process: several endpoints of one process share its connection."""

    def __init__(self) -> None:
        self.own_id = uuid.uuid4().hex
        self._peers: dict[InstanceId, tuple[Peer, int]] = {}
        self._listeners: list[Callable[[], None]] = []

    def on_change(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()

    def join(self, instance: Instance) -> Peer:
        peer, users = self._peers.get(instance.id, (None, 0))
        if peer is None:
            peer = Peer(instance, self.own_id, self._changed)
        self._peers[instance.id] = (peer, users + 1)
        return peer

    def leave(self, instance_id: InstanceId) -> None:
        peer, users = self._peers.pop(instance_id)
        if users > 1:
            self._peers[instance_id] = (peer, users - 1)
        else:
            peer.close()

    async def close(self) -> None:
        tasks = [peer._task for peer, _ in self._peers.values()]
        for peer, _ in self._peers.values():
            peer.close()
            if peer.connection is not None:
                peer.connection.close()
        await asyncio.gather(*tasks, return_exceptions=True)
