"""`DistributedRuntime`: everything that one process of a graph has towards the others."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from dynamo.errors import TransportError
from dynamo.runtime.client import Client
from dynamo.runtime.discovery import Discovery
from dynamo.runtime.peers import Peers, host_id
from dynamo.runtime.server import Endpoint, Server
from dynamo.transport.etcd import Delete, Etcd, Put
from dynamo.transport.nats import DEFAULT_URL, Nats
from dynamo.transport.stream import StreamListener
from dynamo.wire import codec
from dynamo.wire.messages import Instance, subject

log = logging.getLogger(__name__)

LEASE_TTL_S = 10
DEFAULT_ETCD = "http://localhost:2379"
STREAM_PORTS = range(20000, 32768)  # below the range that the kernel gives to outgoing connections


class DistributedRuntime:
    """Connects to etcd and NATS at the first use (`connect`), so that a process may fork before.

    `run_dir` holds the process's stream socket; without one, only TCP is offered. All work of the runtime ends in
    `close`.
    """

    def __init__(
        self,
        *,
        nats_url: str | None = None,
        etcd_endpoints: str | None = None,
        run_dir: Path | None = None,
        name: str = "dynamo",
    ) -> None:
        self.nats_url = nats_url or os.environ.get("NATS_SERVER") or DEFAULT_URL
        self.etcd_endpoints = etcd_endpoints or os.environ.get("ETCD_ENDPOINTS") or DEFAULT_ETCD
        self.name = name
        self._run_dir = run_dir
        self._connecting = asyncio.Lock()
        self._clients: dict[tuple[str, str, str], Client] = {}
        self._watching: set[asyncio.Task[None]] = set()
        self._registered: list[str] = []
        self._ready = False
        self.peers = Peers()
        self.listener = StreamListener()

    async def connect(self) -> None:
        """Connect to etcd and NATS and listen for streams; does nothing the second time. Raises TransportError."""
        async with self._connecting:
            if self._ready:
                return
            self.etcd = Etcd.connect(self.etcd_endpoints)
            self.nats, self.lease = await asyncio.gather(
                Nats.connect(self.nats_url, name=self.name), self.etcd.lease(LEASE_TTL_S)
            )
            self.server = Server(self.nats, self.listener)
            unix = self._run_dir / f"{self.lease.id:x}.sock" if self._run_dir is not None else None
            await self._listen(unix)
            self._ready = True

    async def _listen(self, unix: Path | None) -> None:
        host = advertised_host(self.nats_url)
        for port in random.sample(STREAM_PORTS, 50):
            try:
                await self.listener.listen(tcp=(host, port))
                break
            except OSError:
                continue
        else:
            raise TransportError(
                f"no free port for streams on {host}", hint="set DYN_HOST_IP to an address of this host"
            )
        if unix is not None:
            await self.listener.listen(unix=unix)

    @property
    def instance_id(self) -> int:
        return int(self.lease.id)

    async def client(self, namespace: str, component: str, endpoint: str) -> Client:
        """The client of an endpoint, the same one at each call; it follows the instances from now on."""
        await self.connect()
        address = (namespace, component, endpoint)
        if address not in self._clients:
            client = self._clients[address] = Client(address, self.nats, self.peers)
            discovery = Discovery(self.etcd, address, client.join, client.leave)
            self._follow(discovery.run(), f"discovery of {client.name}")
        return self._clients[address]

    async def serve(
        self, namespace: str, component: str, endpoint: str, method: Callable[[Any], Any], request_type: Any = Any
    ) -> None:
        """Serve a method under an address: subscribed on NATS first, then registered in etcd."""
        await self.connect()
        topic = subject(namespace, component, endpoint, self.instance_id)
        served = Endpoint(endpoint, method, codec.decoder(request_type), f"{self.name} {endpoint}")
        await self.server.add(served, topic)
        await self.nats.flush()
        instance = Instance(
            namespace=namespace,
            component=component,
            endpoint=endpoint,
            instance_id=self.instance_id,
            transport={"nats_tcp": topic},
            streams=self.listener.addresses,
            host=host_id(),
        )
        await self.publish(f"instances/{namespace}/{component}/{endpoint}:{self.instance_id:x}", instance)

    async def publish(self, key: str, value: Any) -> None:
        """Put a value (as JSON) under a key that lives as long as this process."""
        await self.connect()
        if key not in self._registered:
            self._registered.append(key)
        await self.lease.put(key, msgspec.json.encode(value))

    async def follow(self, prefix: str) -> AsyncIterator[dict[str, bytes]]:
        """All keys of etcd under a prefix, again after every change; the last state while etcd is away."""
        await self.connect()
        view: dict[str, bytes] = {}
        async with aclosing(self.etcd.watch_prefix(prefix)) as events:
            async for event in events:
                if isinstance(event, Put):
                    view[event.key] = event.value
                elif isinstance(event, Delete):
                    view.pop(event.key, None)
                else:
                    view = dict(event.items)
                yield view

    def _follow(self, work: Any, what: str) -> None:
        async def run() -> None:
            try:
                await work
            except TransportError as error:
                log.error("%s ended: %s", what, error)

        task = asyncio.get_running_loop().create_task(run(), name=what)
        self._watching.add(task)
        task.add_done_callback(self._watching.discard)

    async def deregister(self) -> None:
        """Take this process out of discovery; what runs here goes on."""
        if self._ready:
            for key in self._registered:
                try:
                    await self.lease.delete(key)
                except TransportError as error:
                    log.warning("cannot deregister: %s", error.message)
                    break
            self._registered.clear()

    async def drain(self, limit_s: float) -> None:
        """Deregister and let running calls finish for up to `limit_s`; own calls to others still work."""
        if self._ready:
            self.server.draining = True
            await self.deregister()
            await self.server.drain(limit_s)

    async def close(self) -> None:
        """Close everything; running calls are cut."""
        if not self._ready:
            return
        self._ready = False
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        await self.peers.close()
        await self.listener.close()
        await self.nats.close()
        try:
            await self.lease.revoke()
        except TransportError as error:
            log.debug("lease not revoked: %s", error)
        await self.etcd.close()


def advertised_host(nats_url: str) -> str:
    """The address on which other processes reach this one: DYN_HOST_IP, else the one that faces the NATS server."""
    given = os.environ.get("DYN_HOST_IP")
    if given:
        return given
    parts = urlsplit(nats_url.partition(",")[0])
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((parts.hostname or "localhost", parts.port or 4222))
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"
