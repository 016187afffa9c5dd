"""`DistributedRuntime` of the 0.x binding, over the runtime that services of a graph use."""

from __future__ import annotations

import asyncio
from typing import Any

from dynamo.rpc.runtime import Runtime
from dynamo.runtime.cancellation import CancellationToken
from dynamo.runtime.component import Namespace, PrimaryLease
from dynamo.runtime.etcd import EtcdClient


class DistributedRuntime:
    """The connections of one process, for code that works without a graph.

    It connects at the first use. `event_loop` is accepted for 0.x and ignored: the running loop is used. With `is_static`
    there is no etcd: each endpoint has one instance, at a fixed address. Further keywords are those of `Runtime`, unless
    `inner` is given: an existing runtime to wrap.
    """

    def __init__(
        self,
        event_loop: asyncio.AbstractEventLoop | None = None,
        is_static: bool = False,
        *,
        inner: Runtime | None = None,
        **options: Any,
    ) -> None:
        self._event_loop = event_loop
        self.inner = inner if inner is not None else Runtime(is_static=is_static, **options)

    @property
    def is_static(self) -> bool:
        return self.inner.is_static

    @property
    def instance_id(self) -> int:
        return self.inner.instance_id

    def namespace(self, name: str) -> Namespace:
        return Namespace(self.inner, name)

    def primary_lease(self) -> PrimaryLease:
        return PrimaryLease(self.inner)

    def etcd_client(self) -> EtcdClient | None:
        """Return the client of etcd, which connects at its first call; None for a static runtime."""
        return None if self.is_static else EtcdClient(self.inner)

    def event_loop(self) -> asyncio.AbstractEventLoop:
        return self._event_loop or asyncio.get_running_loop()

    def primary_token(self) -> CancellationToken:
        """Return a token that is cancelled when this runtime stops, and that stops it."""
        return CancellationToken(self.inner, primary=True)

    def child_token(self) -> CancellationToken:
        """Return a token that is cancelled when this runtime stops, or by itself."""
        return CancellationToken(self.inner)

    async def connect(self) -> None:
        """Connect to etcd and NATS; no-op the second time. Raises TransportError."""
        await self.inner.connect()

    def shutdown(self) -> None:
        """Stop serving: running calls may finish, `serve_endpoint` returns."""
        self.inner.shutdown()

    async def close(self) -> None:
        """Close all connections. Running calls end with UnavailableError."""
        await self.inner.close()
