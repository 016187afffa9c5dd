"""An etcd lease that outlives a restart of etcd, with the keys registered under it."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any, NewType

from dynamo.errors import TransportError
from dynamo.tasks import TaskSet
from dynamo.transport.etcd_cluster import (
    ATTEMPT_TIMEOUT_S,
    PAUSE_S,
    Cluster,
    RetryableError,
    StatusCode,
    aio,
    rpc,
)

log = logging.getLogger(__name__)

LeaseId = NewType("LeaseId", int)


class Lease:
    """A lease that keeps itself alive, and the keys registered under it.

    When etcd loses it (it expired while etcd or the network was down, etcd was wiped, somebody revoked it), it is
    granted again under the same id, and all its keys are put again.
    """

    def __init__(self, cluster: Cluster, tasks: TaskSet, lease_id: LeaseId, ttl_s: int) -> None:
        self.id = lease_id
        self.ttl_s = ttl_s
        self._cluster = cluster
        self._keys: dict[str, bytes] = {}
        self._missing: dict[str, bytes] = {}  # those of them that etcd may lack
        self._lock = asyncio.Lock()
        self._keeper = tasks.spawn(self._keep_alive(), name=f"lease {lease_id:x}")

    async def put(self, key: str, value: bytes) -> None:
        """Register a key. After a `TransportError` it is still registered, as soon as etcd answers again."""
        async with self._lock:
            self._keys[key] = self._missing[key] = value
            await self._register()

    async def delete(self, key: str) -> None:
        """Delete a key of this lease. After a `TransportError` it may stay in etcd until the lease ends."""
        async with self._lock:
            self._keys.pop(key, None)
            self._missing.pop(key, None)
            await self._cluster.call(lambda stubs: stubs.kv.DeleteRange, rpc.DeleteRangeRequest(key=key.encode()))

    async def revoke(self) -> None:
        """End the lease and delete its keys. After a `TransportError`, that happens when its TTL is over."""
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)
        request = rpc.LeaseRevokeRequest(ID=self.id)
        await self._cluster.call(lambda stubs: stubs.lease.LeaseRevoke, request, None, StatusCode.NOT_FOUND)

    async def _keep_alive(self) -> None:
        while True:
            try:
                with suppress(RetryableError):
                    await self._beat()
            except TransportError as error:
                log.warning("etcd lease %x: %s", self.id, error.message)
            except Exception:
                log.exception("etcd lease %x: keep-alive failed; retrying", self.id)
            await asyncio.sleep(PAUSE_S)

    async def _beat(self) -> None:
        """Keep the lease alive over one stream, until that breaks."""
        attempt = await self._cluster.start_attempt()
        call = attempt.member.stubs.lease.LeaseKeepAlive(metadata=attempt.metadata)
        ended = asyncio.Event()
        call.add_done_callback(lambda _: ended.set())
        try:
            while not ended.is_set():
                reply = await attempt.run(self._renew(call))
                if reply is aio.EOF:
                    return
                async with self._lock:
                    if reply.TTL <= 0:
                        await self._restore()
                    await self._register()
                with suppress(TimeoutError):  # a broken stream ends the wait: etcd may come back without the lease
                    async with asyncio.timeout(self.ttl_s / 3):
                        await ended.wait()
        finally:
            call.cancel()

    async def _renew(self, call: Any) -> Any:
        """Send one keep-alive and return the reply, or EOF. Raises TimeoutError."""
        async with asyncio.timeout(ATTEMPT_TIMEOUT_S):
            await call.write(rpc.LeaseKeepAliveRequest(ID=self.id))
            return await call.read()

    async def _restore(self) -> None:
        """Grant the lease again under its id; all its keys are missing then."""
        log.warning("etcd lost lease %x: granting it again with %d keys", self.id, len(self._keys))
        request = rpc.LeaseGrantRequest(TTL=self.ttl_s, ID=self.id)
        exists = StatusCode.FAILED_PRECONDITION
        await self._cluster.call(lambda stubs: stubs.lease.LeaseGrant, request, None, exists)
        self._missing = dict(self._keys)

    async def _register(self) -> None:
        """Put the keys that etcd may lack."""
        while self._missing:
            key, value = next(iter(self._missing.items()))
            request = rpc.PutRequest(key=key.encode(), value=value, lease=self.id)
            no_lease = StatusCode.NOT_FOUND
            reply, _ = await self._cluster.call(lambda stubs: stubs.kv.Put, request, None, no_lease)
            if reply is None:
                await self._restore()
            else:
                del self._missing[key]
