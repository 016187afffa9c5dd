"""A lease of etcd that outlives etcd's restart, with the keys registered under it."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import NewType

from dynamo.errors import TransportError
from dynamo.transport.etcd_cluster import PAUSE_S, TRY_S, Again, Cluster, StatusCode, aio, rpc

log = logging.getLogger(__name__)

LeaseId = NewType("LeaseId", int)


class Lease:
    """A lease that keeps itself alive, and the keys registered under it.

    When etcd loses it (it expired while etcd or the network was down, etcd was wiped, somebody revoked it), it is
    granted again under the same id, and all its keys are put again.
    """

    def __init__(self, cluster: Cluster, lease_id: LeaseId, ttl_s: int) -> None:
        self.id, self.ttl_s = lease_id, ttl_s
        self._cluster = cluster
        self._keys: dict[str, bytes] = {}
        self._missing: dict[str, bytes] = {}  # those of them that etcd may lack
        self._lock = asyncio.Lock()
        self.keeper = asyncio.create_task(self._keep_alive(), name=f"etcd lease {lease_id:x}")

    async def put(self, key: str, value: bytes) -> None:
        """Register a key. After a `TransportError` it is registered all the same, as soon as etcd answers again."""
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
        """End the lease, and with it its keys, at once; after a `TransportError`, when its TTL is over."""
        self.keeper.cancel()
        await asyncio.gather(self.keeper, return_exceptions=True)
        request, gone = rpc.LeaseRevokeRequest(ID=self.id), StatusCode.NOT_FOUND
        await self._cluster.call(lambda stubs: stubs.lease.LeaseRevoke, request, None, gone)

    async def _keep_alive(self) -> None:
        while True:
            try:
                with suppress(Again):
                    await self._beat()
            except TransportError as error:
                log.warning("etcd lease %x: %s", self.id, error.message)
            except Exception:
                log.exception("etcd lease %x: keep-alive failed; trying on", self.id)
            await asyncio.sleep(PAUSE_S)

    async def _beat(self) -> None:
        """Keep the lease alive over one stream, until that breaks."""
        async with self._cluster.attempt() as (member, metadata):
            call, ended = member.stubs.lease.LeaseKeepAlive(metadata=metadata), asyncio.Event()
            call.add_done_callback(lambda _: ended.set())
            try:
                while not ended.is_set():
                    async with asyncio.timeout(TRY_S):
                        await call.write(rpc.LeaseKeepAliveRequest(ID=self.id))
                        reply = await call.read()
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

    async def _restore(self) -> None:
        log.warning("etcd lost lease %x: granting it again with %d keys", self.id, len(self._keys))
        request = rpc.LeaseGrantRequest(TTL=self.ttl_s, ID=self.id)
        exists = StatusCode.FAILED_PRECONDITION
        await self._cluster.call(lambda stubs: stubs.lease.LeaseGrant, request, None, exists)
        self._missing = dict(self._keys)

    async def _register(self) -> None:
        while self._missing:
            key, value = next(iter(self._missing.items()))
            request = rpc.PutRequest(key=key.encode(), value=value, lease=self.id)
            no_lease = StatusCode.NOT_FOUND
            reply, _ = await self._cluster.call(lambda stubs: stubs.kv.Put, request, None, no_lease)
            if reply is None:
                await self._restore()
            else:
                del self._missing[key]
