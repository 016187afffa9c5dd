"""An etcd lease that outlives a restart of etcd, with the keys registered under it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
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

REVOKED_PREFIX = "dynamo/revoked/"
REVOKED_TTL_S = 60
"""How long the mark of a lease that was ended for good is kept: longer than its process takes to notice."""


class LeaseRevokedError(TransportError):
    """Another process ended the lease for good."""


def creation(key: str, value: bytes, lease_id: int) -> Any:
    """Return the transaction that writes a key if it does not exist, and reads it if it does."""
    name = key.encode()
    absent = rpc.Compare(key=name, target=rpc.Compare.CREATE, result=rpc.Compare.EQUAL, create_revision=0)
    put = rpc.RequestOp(request_put=rpc.PutRequest(key=name, value=value, lease=lease_id))
    get = rpc.RequestOp(request_range=rpc.RangeRequest(key=name))
    return rpc.TxnRequest(compare=[absent], success=[put], failure=[get])


def created(reply: Any, value: bytes, lease_id: int, *, retried: bool) -> bool:
    """Return whether a `creation` wrote the key, perhaps in an earlier attempt whose reply was lost."""
    if reply.succeeded or not retried:
        return bool(reply.succeeded)
    present = reply.responses[0].response_range.kvs
    return bool(present and present[0].value == value and present[0].lease == lease_id)


class Lease:
    """A lease that keeps itself alive, and the keys registered under it.

    When etcd loses it (it expired while etcd or the network was down, etcd was wiped, somebody revoked it), it is
    granted again under the same id, with those of its keys that no other process has written meanwhile. If it was ended
    for good (`Etcd.revoke`), `on_revoked` is called instead.
    """

    def __init__(
        self,
        cluster: Cluster,
        tasks: TaskSet,
        lease_id: LeaseId,
        ttl_s: int,
        on_revoked: Callable[[], None] | None = None,
    ) -> None:
        self.id = lease_id
        self.ttl_s = ttl_s
        self._cluster = cluster
        self._keys: dict[str, bytes] = {}
        self._missing: dict[str, bytes] = {}  # those of them that etcd may lack
        self._lost: set[str] = set()  # those of the missing that etcd had, and lost with the lease
        self._on_revoked = on_revoked
        self._lock = asyncio.Lock()
        self._keeper = tasks.spawn(self._keep_alive(), name=f"lease {lease_id:x}")

    async def put(self, key: str, value: bytes) -> None:
        """Register a key. After a `TransportError` it is still registered, as soon as etcd answers again."""
        async with self._lock:
            self._keys[key] = self._missing[key] = value
            self._lost.discard(key)
            await self._register()

    async def create(self, key: str, value: bytes) -> bool:
        """Register a key only if it does not exist in etcd; True if this call wrote it."""
        async with self._lock:
            written = await self._create(key, value)
            if written:
                self._keys[key] = value
                self._missing.pop(key, None)
                self._lost.discard(key)
            await self._register()
            return written

    async def delete(self, key: str) -> None:
        """Delete a key of this lease. After a `TransportError` it may stay in etcd until the lease ends."""
        async with self._lock:
            self._keys.pop(key, None)
            self._missing.pop(key, None)
            self._lost.discard(key)
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
            except LeaseRevokedError as error:
                log.warning("%s", error.message)
                if self._on_revoked is not None:
                    self._on_revoked()
                return
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
        """Grant the lease again under its id; all its keys are missing then. Raises LeaseRevokedError."""
        mark = rpc.RangeRequest(key=f"{REVOKED_PREFIX}{self.id:x}".encode())
        if (await self._cluster.call(lambda stubs: stubs.kv.Range, mark))[0].kvs:
            raise LeaseRevokedError(f"etcd lease {self.id:x} was revoked by another process")
        log.warning("etcd lost lease %x: granting it again with %d keys", self.id, len(self._keys))
        request = rpc.LeaseGrantRequest(TTL=self.ttl_s, ID=self.id)
        exists = StatusCode.FAILED_PRECONDITION
        self._lost |= self._keys.keys() - self._missing.keys()
        self._missing = dict(self._keys)  # before the call, which may succeed although its reply is lost
        await self._cluster.call(lambda stubs: stubs.lease.LeaseGrant, request, None, exists)

    async def _register(self) -> None:
        """Write the keys that etcd may lack: those that it lost, unless another process has written them meanwhile."""
        while self._missing:
            key, value = next(iter(self._missing.items()))
            if key in self._lost:
                if not await self._create(key, value, retried=True):
                    del self._keys[key]
            else:
                request = rpc.PutRequest(key=key.encode(), value=value, lease=self.id)
                no_lease = StatusCode.NOT_FOUND
                reply, _ = await self._cluster.call(lambda stubs: stubs.kv.Put, request, None, no_lease)
                if reply is None:
                    await self._restore()
                    continue
            self._lost.discard(key)
            del self._missing[key]

    async def _create(self, key: str, value: bytes, *, retried: bool = False) -> bool:
        """Write a key if it does not exist; return whether that happened, now or, if `retried`, before."""
        while True:
            request = creation(key, value, self.id)
            no_lease = StatusCode.NOT_FOUND
            reply, attempts = await self._cluster.call(lambda stubs: stubs.kv.Txn, request, None, no_lease)
            if reply is not None:
                return created(reply, value, self.id, retried=retried or attempts > 1)
            await self._restore()
