"""`Runtime`: the connections of one process of a graph to etcd, NATS and the other processes."""

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
from dynamo.rpc.messages import Instance, instances_prefix, subject, type_name
from dynamo.rpc.metrics import ProcessMetrics
from dynamo.rpc.nats_service import serve_service_info
from dynamo.rpc.served_endpoint import ServedEndpoint
from dynamo.rpc.server import RpcServer
from dynamo.rpc.server_connection import StreamListener
from dynamo.rpc.static_discovery import StaticDiscovery, serve_lookups, static_subject
from dynamo.tasks import TaskSet, Work
from dynamo.transport.etcd import Delete, Etcd, Put
from dynamo.transport.nats import DEFAULT_URL, Nats, NatsListener
from dynamo.transport.network import PORT_ATTEMPTS, STREAM_PORTS, advertised_host, bound_host, host_id
from dynamo.transport.work_queue import JetStreamQueue

log = logging.getLogger(__name__)

LEASE_TTL_S = 10
REVOKE_TIMEOUT_S = 1.0
SHUTDOWN_DRAIN_S = 25.0
DEFAULT_ETCD = "http://localhost:2379"


class Runtime:
    """The connections of one process. It connects at the first use (`connect`), so that a process may fork before.

    `run_dir` holds the process's unix socket for RPC; without one, it offers TCP only. `close` ends everything that the
    runtime started. With `is_static` there is no etcd: each endpoint has one instance, at a fixed address.
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
        """The id of this process as an instance and of its etcd lease, chosen here: known before the process connects."""
        self.serving = False
        self._stopped = asyncio.Event()
        self._shutting_down = False
        self._tasks = TaskSet(name)
        self._run_dir = run_dir
        self._connecting = asyncio.Lock()
        self._clients: dict[tuple[str, str, str], Client] = {}
        self._registered: list[str] = []
        self._queues: list[JetStreamQueue] = []
        self._ready = False
        self._closed = False
        self.metrics = ProcessMetrics(self.instance_id, self._clients)
        self.connections = ConnectionPool()
        self.requests_over_nats = requests_over_nats()
        self.listener = StreamListener()

    async def connect(self) -> None:
        """Connect to etcd and NATS and listen for RPC connections. Later calls are no-ops. Raises TransportError."""
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
                    self.lease = await self.etcd.lease(LEASE_TTL_S, self.instance_id, on_revoked=self.shutdown)
                self.server = RpcServer(self.nats, self.listener)
                await self._listen()
                opened.callback(self._heartbeat.close)
                await serve_service_info(self.nats, self.server, self.instance_id)
                await self.metrics.serve(self.nats)
                opened.pop_all()
            self._ready = True

    async def _listen(self) -> None:
        host = bound_host(self.nats_url)
        advertised = advertised_host(self.nats_url)
        self._heartbeat = Heartbeat(host, advertised)
        for port in random.sample(STREAM_PORTS, PORT_ATTEMPTS):
            try:
                await self.listener.listen(tcp=(host, port))
            except OSError:
                continue
            self.listener.addresses["tcp"] = f"{advertised}:{port}"
            break
        else:
            raise TransportError(
                f"no free port for RPC connections on {host}", hint="set DYN_HOST_IP to an address of this host"
            )
        if self._run_dir is not None:
            unix = self._run_dir / f"{self.instance_id:x}.sock"
            try:
                await self.listener.listen(unix=unix)
            except OSError as error:  # such as a path of more than 107 bytes
                log.warning("cannot listen on unix socket %s, using TCP only: %s", unix, error)

    def etcd_client(self) -> Etcd | None:
        """Return the etcd client; None before the runtime is connected, or if it is static."""
        return self.etcd if self._ready and not self.is_static else None

    @property
    def nats_away_s(self) -> float:
        """Seconds since the connection to NATS was lost; 0 while it is up, and before the first connection."""
        return self.nats.away_s if self._ready else 0.0

    async def client(self, namespace: str, component: str, endpoint: str) -> Client:
        """Return the client of an endpoint, the same one at each call. It follows the endpoint's instances from now on."""
        await self.connect()
        address = (namespace, component, endpoint)
        if address not in self._clients:
            client = self._clients[address] = Client(address, self.nats, self.connections, self.requests_over_nats)
            discovery = (
                StaticDiscovery(self.nats, address, client.join, client.leave)
                if self.is_static
                else Discovery(self.etcd, address, client.join, client.leave)
            )
            self._tasks.spawn(discovery.run(), name=f"discovery of {client.name}")
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
        """Serve a method under an address: subscribe on NATS, then register the instance in etcd.

        What `stats_data` returns is added to the endpoint's `$SRV.STATS`.
        """
        await self.connect()
        address = (namespace, component, endpoint)
        topic = static_subject(*address) if self.is_static else subject(*address, self.instance_id)
        where = f"{self.name} {endpoint}"
        decode = codec.decoder(request_type)
        await self.server.add(ServedEndpoint(address, topic, _with_argument(method), decode, where, stats_data))
        await self.nats.flush()
        instance = Instance(
            namespace=namespace,
            component=component,
            endpoint=endpoint,
            instance_id=self.instance_id,
            transport={"nats_tcp": topic, "stream": self.listener.key},
            streams={**self.listener.addresses, "pulse": self._heartbeat.address},
            host=host_id(),
            request_type=type_name(request_type),
        )
        self.serving = True
        if self.is_static:
            await serve_lookups(self.nats, instance)
        else:
            await self.publish(f"{instances_prefix(*address)}{self.instance_id:x}", instance)

    async def publish(self, key: str, value: Any) -> None:
        """Put a value, as JSON, under an etcd key that lives as long as this process. Raises TransportError."""
        await self.connect()
        if self.is_static:
            raise TransportError(f"cannot publish {key}: this runtime is static and has no etcd")
        if key not in self._registered:
            self._registered.append(key)
        await self.lease.put(key, msgspec.json.encode(value))

    async def send(self, subject: str, payload: bytes) -> None:
        """Publish on a NATS subject. Raises TransportError when NATS is unavailable."""
        if not self._ready:
            await self.connect()
        await self.nats.publish(subject, payload)

    async def listen(self, subject: str, handler: Callable[[bytes], None]) -> NatsListener:
        """Call `handler`, which must not raise, for each message on a NATS subject until the listener is closed."""
        await self.connect()
        return await self.nats.listen(subject, handler)

    async def request(self, subject: str, payload: bytes, timeout_s: float) -> bytes:
        """Send a request on a NATS subject and return the first answer.

        Raises NoInstancesError if nothing subscribes to the subject, TransportError without an answer in time.
        """
        await self.connect()
        return await self.nats.request(subject, payload, timeout_s)

    def work_queue(self, stream: str, subject: str, **limits: Any) -> JetStreamQueue:
        """Return a work queue of JetStream with the `limits` of `JetStreamQueue`. It connects at the first use."""

        async def connected() -> Nats:
            await self.connect()
            return self.nats

        queue = JetStreamQueue(connected, stream, subject, **limits)
        self._queues.append(queue)
        return queue

    async def follow(self, prefix: str) -> AsyncIterator[dict[str, bytes]]:
        """Yield all etcd keys under a prefix, again after every change."""
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

    def spawn(self, work: Work, *, name: str) -> None:
        """Run `work` in the background until it ends or this runtime is closed. What it raises is logged."""
        self._tasks.spawn(work, name=name)

    def shutdown(self) -> None:
        """Start to stop: `stopped` returns, running calls may finish. May be called in a signal handler."""
        self._stopped.set()
        if self._ready and not self._shutting_down:
            self._shutting_down = True
            self._tasks.spawn(self.drain(SHUTDOWN_DRAIN_S), name="drain")

    @property
    def is_stopped(self) -> bool:
        """True once `stopped` returns at once."""
        return self._stopped.is_set()

    async def stopped(self) -> None:
        """Wait until `shutdown`, `drain` or `close` is called."""
        await self._stopped.wait()

    async def deregister(self) -> None:
        """Remove this process from discovery. Running calls are not affected."""
        if self._ready:
            for key in self._registered:
                try:
                    await self.lease.delete(key)
                except TransportError as error:
                    log.warning("cannot deregister: %s", error.message)
                    break
            self._registered.clear()

    async def drain(self, limit_s: float) -> None:
        """Deregister and let running calls finish for up to `limit_s`. Calls to other processes still work."""
        self._stopped.set()
        if self._ready:
            self.server.draining = True
            await self.deregister()
            await asyncio.gather(*(queue.stop() for queue in self._queues))
            await self.server.drain(limit_s)

    async def close(self) -> None:
        """Close everything for good. Running calls end with UnavailableError."""
        async with self._connecting:
            self._closed = True
            self._stopped.set()
            if not self._ready:
                return
            self._ready = False
        await self._tasks.aclose()
        await self.server.close()
        await asyncio.gather(*(queue.close() for queue in self._queues))
        if not self.is_static:
            await self._revoke()
        await asyncio.gather(*(client.close() for client in self._clients.values()))
        await self.connections.close()
        await self.listener.close()
        self._heartbeat.close()
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
    """Return the method as a function of one argument, which is dropped if the method takes none."""
    try:
        parameters = inspect.signature(method).parameters
    except (TypeError, ValueError):  # a builtin
        return method
    return method if parameters else lambda _: method()
