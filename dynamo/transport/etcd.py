"""An asyncio client of etcd v3 whose watches and leases outlive a restart of etcd.

    async with Etcd.connect("http://127.0.0.1:2379") as etcd:
        lease = await etcd.lease(ttl_s=10)
        await lease.put("instances/a", b"...")
        async for event in etcd.watch_prefix("instances/"):
            ...

`etcd_cluster` makes the calls and retries them.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from dynamo.errors import TransportError
from dynamo.tasks import TaskSet
from dynamo.transport.credentials import EtcdCredentials, etcd_credentials
from dynamo.transport.etcd_cluster import PAUSE_S, Cluster, RetryableError, StatusCode, aio, rpc
from dynamo.transport.etcd_lease import REVOKED_PREFIX, REVOKED_TTL_S, Lease, LeaseId, created, creation


class KeyValue(NamedTuple):
    """A key with its value; the rest are etcd's numbers on it. `mod_revision` is that of the last change."""

    key: str
    value: bytes
    mod_revision: int
    create_revision: int
    version: int
    lease: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All keys under the prefix; replaces everything that was known before."""

    items: dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Put:
    """The key was written."""

    key: str
    value: bytes


@dataclass(frozen=True, slots=True)
class Delete:
    """The key was deleted, or its lease ended."""

    key: str


Event = Snapshot | Put | Delete


class Etcd:
    """A client of etcd, over one or several endpoints of one cluster: when one fails, the next one is used.

    Every call is retried, on a refused connection, a lost leader or an invalid token, for `timeout_s` (a client that never
    reached etcd: at most 2 s) and then raises `TransportError`; what etcd itself refuses (permission, a full disk, a
    lease that does not exist) raises it without a retry. `close()` ends every lease's keep-alive and every watch. Leases
    then expire after their TTL: call `Lease.revoke()` if their keys should be deleted right away.

    It belongs to the event loop that first used it. **Never fork afterwards**: a child forked from a process with an
    open gRPC channel hangs as soon as it opens one of its own. Fork first, or spawn.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._tasks = TaskSet("etcd")

    @classmethod
    def connect(
        cls,
        endpoints: str,
        *,
        credentials: EtcdCredentials | None = None,
        timeout_s: float = 5.0,
    ) -> Self:
        """Return a client of `endpoints`, as in ETCD_ENDPOINTS: "http://host:2379,https://...".

        It connects at the first call, with `credentials`: by default those in the addresses or of `ETCD_AUTH_*`.
        `https://` means TLS, verified with their authorities (else the system's). `timeout_s` is the default of every call.
        Raises ConfigError for an invalid address or credentials that cannot be read.
        """
        return cls(Cluster(endpoints, credentials or etcd_credentials(endpoints), timeout_s))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all tasks, watches and connections of this client; calls in flight raise `TransportError`."""
        self._cluster.closed = True
        await self._tasks.aclose()
        await self._cluster.close()

    # -- keys

    async def put(self, key: str, value: bytes, lease: int | None = None, *, timeout_s: float | None = None) -> None:
        """Write a key, bound to `lease` if given (`TransportError` if there is no such lease).

        When etcd fails between writing and answering, the key is written again: a watch sees that as two events.
        """
        request = rpc.PutRequest(key=key.encode(), value=value, lease=lease or 0)
        await self._cluster.call(lambda stubs: stubs.kv.Put, request, timeout_s)

    async def create(self, key: str, value: bytes, lease: int | None = None, *, timeout_s: float | None = None) -> bool:
        """Write a key only if it does not exist; True if this call wrote it."""
        request = creation(key, value, lease or 0)
        reply, attempts = await self._cluster.call(lambda stubs: stubs.kv.Txn, request, timeout_s)
        return created(reply, value, lease or 0, retried=attempts > 1)

    async def get(self, key: str, *, timeout_s: float | None = None) -> bytes | None:
        """Return the value of a key; None if it does not exist."""
        reply, _ = await self._cluster.call(lambda stubs: stubs.kv.Range, rpc.RangeRequest(key=key.encode()), timeout_s)
        return bytes(reply.kvs[0].value) if reply.kvs else None

    async def get_prefix(self, prefix: str, *, timeout_s: float | None = None) -> tuple[list[KeyValue], int]:
        """Return all keys that begin with `prefix` ("" for all), sorted, and the revision of that state."""
        return await self._range(prefix, 0, timeout_s)

    async def delete(self, key: str, *, timeout_s: float | None = None) -> bool:
        """Delete a key; False if it did not exist (or an attempt whose reply was lost deleted it)."""
        request = rpc.DeleteRangeRequest(key=key.encode())
        reply, _ = await self._cluster.call(lambda stubs: stubs.kv.DeleteRange, request, timeout_s)
        return bool(reply.deleted)

    # -- leases

    async def lease(
        self,
        ttl_s: int = 10,
        lease_id: int | None = None,
        *,
        timeout_s: float | None = None,
        on_revoked: Callable[[], None] | None = None,
    ) -> Lease:
        """Grant a lease (see `grant`) that keeps itself alive until it is revoked or this client closes.

        `on_revoked` is called when another process ends it for good.
        """
        granted = await self.grant(ttl_s, lease_id, timeout_s=timeout_s)
        return Lease(self._cluster, self._tasks, granted, ttl_s, on_revoked)

    async def grant(self, ttl_s: int, lease_id: int | None = None, *, timeout_s: float | None = None) -> LeaseId:
        """Grant a lease of `ttl_s` seconds (at least 1.5 election timeouts of etcd) that is not kept alive.

        Its id is `lease_id`, or a random one of 63 bits. Raises TransportError if a lease of that id exists.
        """
        wanted = lease_id or secrets.randbits(62) + 1
        request = rpc.LeaseGrantRequest(TTL=ttl_s, ID=wanted)
        exists = StatusCode.FAILED_PRECONDITION
        reply, attempts = await self._cluster.call(lambda stubs: stubs.lease.LeaseGrant, request, timeout_s, exists)
        if reply is None and attempts == 1:  # at a later attempt it is ours: the reply to an earlier one was lost
            raise TransportError(f"cannot grant etcd lease {wanted:x}: it exists", hint="revoke it first")
        return LeaseId(wanted)

    async def revoke(self, lease_id: int, *, for_good: bool = False, timeout_s: float | None = None) -> None:
        """End a lease and delete its keys. No-op for a lease that does not exist.

        A process that keeps the lease alive grants it again, unless it is ended `for_good`: a mark in etcd says so.
        """
        if for_good:
            await self.put(f"{REVOKED_PREFIX}{lease_id:x}", b"", await self.grant(REVOKED_TTL_S), timeout_s=timeout_s)
        request = rpc.LeaseRevokeRequest(ID=lease_id)
        await self._cluster.call(lambda stubs: stubs.lease.LeaseRevoke, request, timeout_s, StatusCode.NOT_FOUND)

    # -- watches

    async def watch_prefix(self, prefix: str) -> AsyncGenerator[Event, None]:
        """Yield the keys under `prefix` as a `Snapshot`, then every `Put` and `Delete` in etcd's order, without a gap.

        It outlives etcd: after a restart it continues behind the last event, with nothing lost and nothing repeated. If
        that is impossible (the events were compacted, etcd came back empty or with another history) there is a new
        `Snapshot`. Raises `TransportError` if etcd cannot be reached at first, or refuses; ends when this client
        closes. Wrap it in `aclosing` to leave it early.
        """
        view: dict[str, KeyValue] = {}  # what has been yielded: the keys under the prefix at `revision`
        revision = 0
        timeout_s = self._cluster.timeout_s
        try:
            while True:
                # A wiped etcd may have counted up to our revision again: compare the state too.
                if not revision or await self._range(prefix, revision, math.inf) != (sorted(view.values()), revision):
                    items, revision = await self.get_prefix(prefix, timeout_s=timeout_s)
                    view = {item.key: item for item in items}
                    yield Snapshot({item.key: item.value for item in items})
                timeout_s = math.inf
                async with aclosing(self._watch(prefix, revision + 1)) as replies:
                    async for reply in replies:
                        for change in reply.events:
                            item = _key_value(change.kv)
                            if change.type == change.DELETE:
                                view.pop(item.key, None)
                                yield Delete(item.key)
                            else:
                                view[item.key] = item
                                yield Put(item.key, item.value)
                        # The header has etcd's newest revision, which a watch that catches up has not reached; only
                        # in a progress notice (no events) is it the watch's own.
                        revision = reply.events[-1].kv.mod_revision if reply.events else reply.header.revision
                await asyncio.sleep(PAUSE_S)
        except TransportError:
            if not self._cluster.closed:
                raise

    async def _watch(self, prefix: str, start: int) -> AsyncGenerator[Any, None]:
        """Yield the replies of one watch, with events from revision `start` on, until it breaks or etcd cancels it."""
        with suppress(RetryableError):
            attempt = await self._cluster.start_attempt()
            call = attempt.member.stubs.watch.Watch(metadata=attempt.metadata)
            try:
                await attempt.run(call.write(_watch_request(prefix, start)))
                while (reply := await attempt.run(call.read())) is not aio.EOF and not reply.canceled:
                    if not reply.created:
                        yield reply
            finally:
                call.cancel()

    # -- calls

    async def _range(self, prefix: str, revision: int, timeout_s: float | None) -> tuple[list[KeyValue], int]:
        """Return the keys under `prefix` at `revision` (0: now) and that revision; `([], 0)` if etcd does not have it."""
        first, end = _range_of(prefix)
        request = rpc.RangeRequest(key=first, range_end=end, revision=revision)
        no_revision = StatusCode.OUT_OF_RANGE  # compacted, or not reached yet by an etcd that was wiped
        reply, _ = await self._cluster.call(lambda stubs: stubs.kv.Range, request, timeout_s, no_revision)
        if reply is None:
            return [], 0
        return [_key_value(item) for item in reply.kvs], revision or reply.header.revision


def _watch_request(prefix: str, start: int) -> Any:
    first, end = _range_of(prefix)
    create = rpc.WatchCreateRequest(key=first, range_end=end, start_revision=start, progress_notify=True)
    return rpc.WatchRequest(create_request=create)


def _range_of(prefix: str) -> tuple[bytes, bytes]:
    """Return etcd's half-open range of the keys that begin with `prefix`; `(0, 0)` is all keys."""
    if not prefix:
        return b"\0", b"\0"
    name = prefix.encode()
    return name, name[:-1] + bytes([name[-1] + 1])  # UTF-8 has no byte 0xff: nothing to carry


def _key_value(item: Any) -> KeyValue:
    return KeyValue(item.key.decode(), item.value, item.mod_revision, item.create_revision, item.version, item.lease)
