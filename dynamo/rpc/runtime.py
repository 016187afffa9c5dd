"""`Runtime`: everything that one process of a graph has towards the others."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import random
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import msgspec

from dynamo import codec
from dynamo.errors import TransportError
from dynamo.rpc.client import Client, requests_over_nats
from dynamo.rpc.connection_pool import ConnectionPool
from dynamo.rpc.discovery import Discovery, watch
from dynamo.rpc.heartbeat import Heartbeat
from dynamo.rpc.messages import Instance, instances_prefix, subject
from dynamo.rpc.metrics import ProcessMetrics
from dynamo.rpc.nats_service import announce
from dynamo.rpc.server import Endpoint, Server
from dynamo.rpc.server_connection import StreamListener
from dynamo.rpc.static_discovery import StaticDiscovery, static_subject, tell
from dynamo.transport.etcd import Delete, Etcd, Put
from dynamo.transport.nats import DEFAULT_URL, Listening, Nats
from dynamo.transport.network import STREAM_PORTS, advertised_host, bound_host, host_id
from dynamo.transport.work_queue import Queue

log = logging.getLogger(__name__)

LEASE_TTL_S = 10
REVOKE_TIMEOUT_S = 1.0
SHUTDOWN_DRAIN_S = 25.0
DEFAULT_ETCD = "http://localhost:2379"


class Runtime:
    """Connects to etcd and NATS at the first use (`connect`), so that a process may fork before.

    `run_dir` holds the process's stream socket; without one, only TCP is offered. All work of the runtime ends in
    `close`. With `is_static` there is no etcd: each endpoint has one instance, at a fixed address.
    """

    def __init__(
        self,
        *,
        is_static: bool = False,
        nats_url: str | None = None,
        etcd_endpoints: str | None = None,
        run_dir: Path | None = None,
        name: str = "dynamo",
    ) -> None:
        self.nats_url = nats_url or os.environ.get("NATS_SERVER") or DEFAULT_URL
        self.etcd_endpoints = etcd_endpoints or os.environ.get("ETCD_ENDPOINTS") or DEFAULT_ETCD
        self.name = name
        self.is_static = is_static
        self.instance_id = secrets.randbits(62) + 1
        """Of this process as an instance, and of its lease in etcd; chosen here, so that it is known before it connects."""
        self.serving = False
        self._stopped = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None
        self._run_dir = run_dir
        self._connecting = asyncio.Lock()
        self._clients: dict[tuple[str, str, str], Client] = {}
        self._watching: list[asyncio.Task[None]] = []
        self._registered: list[str] = []
        self._queues: list[Queue] = []
        self._ready = self._closed = False
        self.metrics = ProcessMetrics(self.instance_id, self._clients)
        self.peers = ConnectionPool()
        self.requests_over_nats = requests_over_nats()
        self.listener = StreamListener()

    async def connect(self) -> None:
        """Connect to etcd and NATS and listen for streams; does nothing the second time. Raises TransportError."""
        async with self._connecting:
            if self._ready:
                return
            if self._closed:
                raise TransportError("this runtime is closed")
            async with AsyncExitStack() as opened:
                if not self.is_static:
                    self.etcd = Etcd.connect(self.etcd_endpoints)
                    opened.push_async_callback(self.etcd.close)
                self.nats = await Nats.connect(self.nats_url, name=self.name)
                opened.push_async_callback(self.nats.close)
                if not self.is_static:
                    self.lease = await self.etcd.lease(LEASE_TTL_S, self.instance_id)
                self.server = Server(self.nats, self.listener)
                await self._listen()
                opened.callback(self._pulse.close)
                await announce(self.nats, self.server, self.instance_id)
                await self.metrics.answer(self.nats)
                opened.pop_all()
            self._ready = True

    async def _listen(self) -> None:
        host, advertised = bound_host(self.nats_url), advertised_host(self.nats_url)
        self._pulse = Heartbeat(host, advertised)
        for port in random.sample(STREAM_PORTS, 50):
            try:
                await self.listener.listen(tcp=(host, port))
            except OSError:
                continue
            self.listener.addresses["tcp"] = f"{advertised}:{port}"
            break
        else:
            raise TransportError(
                f"no free port for streams on {host}", hint="set DYN_HOST_IP to an address of this host"
            )
        if self._run_dir is not None:
            unix = self._run_dir / f"{self.instance_id:x}.sock"
            try:
                await self.listener.listen(unix=unix)
            except OSError as error:  # such as a path of more than 107 bytes
                log.warning("streams go over TCP only: %s: %s", unix, error)

    def etcd_client(self) -> Etcd | None:
        """The client of etcd, once connected; None for a static runtime."""
        return self.etcd if self._ready and not self.is_static else None

    @property
    def nats_away_s(self) -> float:
        """How long NATS has been away; 0 while it is there, and before the first connection."""
        return self.nats.away_s if self._ready else 0.0

    async def client(self, namespace: str, component: str, endpoint: str) -> Client:
        """The client of an endpoint, the same one at each call; it follows the instances from now on."""
        await self.connect()
        address = (namespace, component, endpoint)
        if address not in self._clients:
            client = self._clients[address] = Client(address, self.nats, self.peers, self.requests_over_nats)
            discovery = (
                StaticDiscovery(self.nats, address, client.join, client.leave)
                if self.is_static
                else Discovery(self.etcd, address, client.join, client.leave)
            )
            task = asyncio.get_running_loop().create_task(discovery.run(), name=f"discovery of {client.name}")
            self._watching.append(task)
        return self._clients[address]

    async def serve(
        self,
        namespace: str,
        component: str,
        endpoint: str,
        method: Callable[[Any], Any],
        request_type: Any = Any,
        stats_data: Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        """Serve a method under an address: subscribed on NATS first, then registered in etcd.

        What `stats_data` gives is in the endpoint's entry of `$SRV.STATS`.
        """
        await self.connect()
        address = (namespace, component, endpoint)
        topic = static_subject(*address) if self.is_static else subject(*address, self.instance_id)
        where = f"{self.name} {endpoint}"
        decode = codec.decoder(request_type)
        await self.server.add(Endpoint(address, topic, _with_argument(method), decode, where, stats_data))
        await self.nats.flush()
        instance = Instance(
            namespace=namespace,
            component=component,
            endpoint=endpoint,
            instance_id=self.instance_id,
            transport={"nats_tcp": topic, "stream": self.listener.key},
            streams={**self.listener.addresses, "pulse": self._pulse.address},
            host=host_id(),
        )
        self.serving = True
        if self.is_static:
            await tell(self.nats, instance)
        else:
            await self.publish(f"{instances_prefix(*address)}{self.instance_id:x}", instance)

    async def publish(self, key: str, value: Any) -> None:
        """Put a value (as JSON) under a key that lives as long as this process."""
        await self.connect()
        if self.is_static:
            raise TransportError(f"cannot publish {key}: this runtime is static and has no etcd")
        if key not in self._registered:
            self._registered.append(key)
        await self.lease.put(key, msgspec.json.encode(value))

    async def send(self, subject: str, payload: bytes) -> None:
        """Publish on a subject of NATS. Raises TransportError when it is away."""
        if not self._ready:
            await self.connect()
        await self.nats.publish(subject, payload)

    async def listen(self, subject: str, handler: Callable[[bytes], None]) -> Listening:
        """Call `handler` for each message on a subject of NATS from now on, until closed; it must not raise."""
        await self.connect()
        return await self.nats.listen(subject, handler)

    def work_queue(self, stream: str, subject: str, **limits: Any) -> Queue:
        """A work queue of JetStream, with the limits that `Queue` takes; it connects at the first use."""

        async def connected() -> Nats:
            await self.connect()
            return self.nats

        queue = Queue(connected, stream, subject, **limits)
        self._queues.append(queue)
        return queue

    async def follow(self, prefix: str) -> AsyncIterator[dict[str, bytes]]:
        """All keys of etcd under a prefix, again after every change; the last state while etcd is away."""
        await self.connect()
        view: dict[str, bytes] = {}
        async with aclosing(watch(self.etcd, prefix)) as events:
            async for event in events:
                if isinstance(event, Put):
                    view[event.key] = event.value
                elif isinstance(event, Delete):
                    view.pop(event.key, None)
                else:
                    view = dict(event.items)
                yield dict(view)

    def shutdown(self) -> None:
        """Stop from anywhere, signal handlers included: `stopped` returns now, running calls finish meanwhile."""
        self._stopped.set()
        if self._ready and self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self.drain(SHUTDOWN_DRAIN_S))

    async def stopped(self) -> None:
        """Returns when the runtime was told to stop, or closed."""
        await self._stopped.wait()

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
        self._stopped.set()
        if self._ready:
            self.server.draining = True
            await self.deregister()
            await asyncio.gather(*(queue.stop() for queue in self._queues))
            await self.server.drain(limit_s)

    async def close(self) -> None:
        """Close everything, for ever; running calls are cut."""
        async with self._connecting:
            self._closed = True
            self._stopped.set()
            if not self._ready:
                return
            self._ready = False
        if self._ending is not None:
            self._ending.cancel()
            await asyncio.gather(self._ending, return_exceptions=True)
        await self.server.close()
        await asyncio.gather(*(queue.close() for queue in self._queues))
        if not self.is_static:
            await self._revoke()
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        await asyncio.gather(*(client.close() for client in self._clients.values()))
        await self.peers.close()
        await self.listener.close()
        self._pulse.close()
        await self.nats.close()
        if not self.is_static:
            await self.etcd.close()

    async def _revoke(self) -> None:
        try:
            async with asyncio.timeout(REVOKE_TIMEOUT_S):
                await self.lease.revoke()
        except (TransportError, TimeoutError) as error:
            log.debug("lease not revoked: %r", error)


def _with_argument(method: Callable[..., Any]) -> Callable[[Any], Any]:
    """A method that takes no request is called without."""
    try:
        takes = len(inspect.signature(method).parameters)
    except (TypeError, ValueError):  # a builtin
        return method
    return method if takes else lambda _: method()
