"""An asyncio client of etcd v3 whose watches and leases outlive a restart of etcd.

    async with Etcd.connect("http://127.0.0.1:2379") as etcd:
        lease = await etcd.lease(ttl_s=10)
        await lease.put("instances/a", b"...")
        async for event in etcd.watch_prefix("instances/"):
            ...

gRPC comes in through `grpc.aio`, etcd's messages from the generated stubs of `aetcd`; no other file imports either.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NewType, Self
from urllib.parse import urlsplit

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # it does not help, and gRPC complains at every subprocess

import aetcd.rpc
import grpc
import grpc.aio

from dynamo.errors import ConfigError, TransportError

log = logging.getLogger(__name__)
aio: Any = grpc.aio
StatusCode: Any = grpc.StatusCode
rpc: Any = aetcd.rpc  # protobuf makes these classes at run time: no type checker sees them

LeaseId = NewType("LeaseId", int)

TRY_S = 1.5  # one try of a call; a call may take several, on one endpoint after the other
PAUSE_S = 0.1  # between two tries
FIRST_CONTACT_S = 2.0  # a client that never reached etcd gives up sooner: the address may be wrong
_CHANNEL_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),  # gRPC's own limit is two minutes
    ("grpc.min_reconnect_backoff_ms", 1500),  # despite its name: how long one attempt to connect may take
    ("grpc.keepalive_time_ms", 6000),  # etcd refuses clients that ping more often than every 5 s
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.http2.max_pings_without_data", 0),  # no limit: an idle watch must notice a dead peer too
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),  # etcd is never behind the proxy that http_proxy names
]
_TRANSIENT = {
    StatusCode.UNAVAILABLE,
    StatusCode.DEADLINE_EXCEEDED,
    StatusCode.UNKNOWN,
    StatusCode.INTERNAL,
    StatusCode.CANCELLED,
}
_NEW_TOKEN_NEEDED = ("invalid auth token", "revision of auth store is old", "user name is empty")


class KeyValue(NamedTuple):
    """A key with its value; `mod_revision` is etcd's revision of the last change."""

    key: str
    value: bytes
    mod_revision: int


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
    """A connection to etcd, over one or several endpoints of one cluster, taken in turn when one fails.

    Every call is tried again, on a refused connection, a lost leader or a token that died, until its `timeout_s` is
    over (a client that never reached etcd: at most 2 s) and then raises `TransportError`; what etcd itself refuses
    (permission, a full disk, a lease that does not exist) raises it at once. `close()` ends every lease's keep-alive
    and every watch; leases then lapse after their TTL, so `Lease.revoke()` what others should see gone.

    It belongs to the event loop that first used it. **Never fork afterwards**: a child forked from a process with an
    open gRPC channel hangs as soon as it opens one of its own. Fork first, or spawn.
    """

    def __init__(self, members: Sequence[_Member], username: str, password: str, timeout_s: float) -> None:
        self.endpoints = ",".join(member.url for member in members)
        self.timeout_s = timeout_s
        self._members = list(members)  # the first is the one in use
        self._username, self._password = username, password
        self._token = None if username else ""  # None: log in first; tokens die with etcd
        self._login_lock = asyncio.Lock()
        self._reached = self._down = self._closed = False
        self._keepers: set[asyncio.Task[None]] = set()

    @classmethod
    def connect(
        cls,
        endpoints: str,
        *,
        username: str = "",
        password: str = "",
        ca_file: str | Path | None = None,
        cert_file: str | Path | None = None,
        key_file: str | Path | None = None,
        timeout_s: float = 5.0,
    ) -> Self:
        """A client of `endpoints`, as in ETCD_ENDPOINTS: "http://host:2379,https://..."; connects at the first call.

        `https://` means TLS, checked against `ca_file` (else the system's authorities); `cert_file` and `key_file`
        identify this client. `timeout_s` is each call's unless it says otherwise. An address that is none or a file
        that cannot be read is a `ConfigError`.
        """
        try:
            ca, cert, key = (Path(name).read_bytes() if name else None for name in (ca_file, cert_file, key_file))
        except OSError as error:
            raise ConfigError(f"cannot read etcd's TLS file {error.filename}: {error.strerror}") from error
        members = [_Member(url, ca, cert, key) for url in filter(None, map(str.strip, endpoints.split(",")))]
        if not members:
            raise ConfigError("no etcd endpoint given", hint="set ETCD_ENDPOINTS, such as http://127.0.0.1:2379")
        return cls(members, username, password, timeout_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all tasks, watches and connections of this client; calls in flight raise `TransportError`."""
        self._closed = True
        for task in self._keepers:
            task.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(member.close() for member in self._members))

    # -- keys

    async def put(self, key: str, value: bytes, lease: int | None = None, *, timeout_s: float | None = None) -> None:
        """Write a key, bound to `lease` if given (`TransportError` if there is no such lease).

        When etcd dies between writing and answering, it is written again: a watch sees that as two events.
        """
        request = rpc.PutRequest(key=key.encode(), value=value, lease=lease or 0)
        await self._call(lambda stubs: stubs.kv.Put, request, timeout_s)

    async def create(self, key: str, value: bytes, lease: int | None = None, *, timeout_s: float | None = None) -> bool:
        """Write a key only if it does not exist; True if this call wrote it."""
        name = key.encode()
        absent = rpc.Compare(key=name, target=rpc.Compare.CREATE, result=rpc.Compare.EQUAL, create_revision=0)
        put = rpc.RequestOp(request_put=rpc.PutRequest(key=name, value=value, lease=lease or 0))
        get = rpc.RequestOp(request_range=rpc.RangeRequest(key=name))
        request = rpc.TxnRequest(compare=[absent], success=[put], failure=[get])
        reply, tries = await self._call(lambda stubs: stubs.kv.Txn, request, timeout_s)
        if reply.succeeded or tries == 1:
            return bool(reply.succeeded)
        there = reply.responses[0].response_range.kvs  # an earlier try may have written it without our seeing the reply
        return bool(there and there[0].value == value and there[0].lease == (lease or 0))

    async def get(self, key: str, *, timeout_s: float | None = None) -> bytes | None:
        """The value of a key; None if it does not exist."""
        reply, _ = await self._call(lambda stubs: stubs.kv.Range, rpc.RangeRequest(key=key.encode()), timeout_s)
        return bytes(reply.kvs[0].value) if reply.kvs else None

    async def get_prefix(self, prefix: str, *, timeout_s: float | None = None) -> tuple[list[KeyValue], int]:
        """All keys that begin with `prefix` ("" for all), by key, and the revision at which this was the state."""
        return await self._range(prefix, 0, timeout_s)

    async def delete(self, key: str, *, timeout_s: float | None = None) -> bool:
        """Delete a key; False if it did not exist (or if a try whose reply was lost deleted it)."""
        request = rpc.DeleteRangeRequest(key=key.encode())
        reply, _ = await self._call(lambda stubs: stubs.kv.DeleteRange, request, timeout_s)
        return bool(reply.deleted)

    async def delete_prefix(self, prefix: str, *, timeout_s: float | None = None) -> int:
        """Delete all keys that begin with `prefix` ("" for all); how many there were."""
        first, end = _range_of(prefix)
        request = rpc.DeleteRangeRequest(key=first, range_end=end)
        reply, _ = await self._call(lambda stubs: stubs.kv.DeleteRange, request, timeout_s)
        return int(reply.deleted)

    # -- leases

    async def lease(self, ttl_s: int = 10, lease_id: int | None = None, *, timeout_s: float | None = None) -> Lease:
        """Grant a lease (see `grant`) that keeps itself alive until it is revoked or this client closes."""
        lease = Lease(self, await self.grant(ttl_s, lease_id, timeout_s=timeout_s), ttl_s)
        self._keepers.add(lease.keeper)
        lease.keeper.add_done_callback(self._keepers.discard)
        return lease

    async def grant(self, ttl_s: int, lease_id: int | None = None, *, timeout_s: float | None = None) -> LeaseId:
        """Grant a lease of `ttl_s` seconds (etcd raises less than 1.5 election timeouts) that nobody keeps alive.

        Its id is `lease_id`, or a random one of 63 bits; TransportError if a lease of that id exists.
        """
        wanted = lease_id or secrets.randbits(62) + 1
        request = rpc.LeaseGrantRequest(TTL=ttl_s, ID=wanted)
        exists = StatusCode.FAILED_PRECONDITION
        reply, tries = await self._call(lambda stubs: stubs.lease.LeaseGrant, request, timeout_s, exists)
        if reply is None and tries == 1:  # at a later try it is ours: the reply to an earlier one was lost
            raise TransportError(f"cannot grant etcd lease {wanted:x}: it exists", hint="revoke it first")
        return LeaseId(wanted)

    async def revoke(self, lease_id: int, *, timeout_s: float | None = None) -> None:
        """End a lease and delete its keys at once; a lease that does not exist is no error."""
        request = rpc.LeaseRevokeRequest(ID=lease_id)
        await self._call(lambda stubs: stubs.lease.LeaseRevoke, request, timeout_s, StatusCode.NOT_FOUND)

    # -- watches

    async def watch_prefix(self, prefix: str) -> AsyncGenerator[Event, None]:
        """The keys under `prefix` as a `Snapshot`, then every `Put` and `Delete` in etcd's order, without a gap.

        It outlives etcd: after a restart it goes on behind the last event, nothing lost and nothing twice. Where that
        cannot be (the events were compacted away, etcd came back empty or with another history) there is a fresh
        `Snapshot`. Raises `TransportError` if etcd cannot be reached at first, or refuses; ends when this client
        closes. Wrap it in `aclosing` to leave it early.
        """
        view: dict[str, KeyValue] = {}  # what the caller knows: the keys under the prefix at `revision`
        revision, timeout_s = 0, self.timeout_s
        try:
            while True:
                # Revisions alone cannot tell a wiped etcd that has counted up to ours again: compare the state too.
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
            if not self._closed:
                raise

    async def _watch(self, prefix: str, start: int) -> AsyncGenerator[Any, None]:
        """Replies of one watch with events from revision `start` on, until it breaks or etcd cancels it."""
        first, end = _range_of(prefix)
        create = rpc.WatchCreateRequest(key=first, range_end=end, start_revision=start, progress_notify=True)
        with suppress(_Again):
            async with self._attempt() as (member, metadata):
                call = member.stubs.watch.Watch(metadata=metadata)
                try:
                    await call.write(rpc.WatchRequest(create_request=create))
                    while (reply := await call.read()) is not aio.EOF and not reply.canceled:
                        if not reply.created:
                            yield reply
                finally:
                    call.cancel()

    # -- calls

    async def _range(self, prefix: str, revision: int, timeout_s: float | None) -> tuple[list[KeyValue], int]:
        """The keys under `prefix` at `revision` (0: now) and that revision; `([], 0)` if etcd does not have it."""
        first, end = _range_of(prefix)
        request = rpc.RangeRequest(key=first, range_end=end, revision=revision)
        gone = StatusCode.OUT_OF_RANGE  # compacted, or not reached yet by an etcd that was wiped
        reply, _ = await self._call(lambda stubs: stubs.kv.Range, request, timeout_s, gone)
        if reply is None:
            return [], 0
        return [_key_value(item) for item in reply.kvs], revision or reply.header.revision

    async def _call(
        self,
        method: Callable[[Any], Any],
        request: Any,
        timeout_s: float | None = None,
        accept: Any = None,
    ) -> tuple[Any, int]:
        """The reply, and at which try it came; the reply is None if etcd refuses with the status `accept`."""
        allowed_s = self.timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + (allowed_s if self._reached else min(allowed_s, FIRST_CONTACT_S))
        tries = 0
        while True:
            tries += 1
            try:
                async with self._attempt() as (member, metadata):
                    left_s = max(deadline - time.monotonic(), PAUSE_S)
                    reply = await method(member.stubs)(request, metadata=metadata, timeout=min(left_s, TRY_S))
                if self._down:
                    log.info("etcd answers again at %s", member.url)
                self._reached, self._down = True, False
                return reply, tries
            except _Again as again:
                if time.monotonic() + PAUSE_S > deadline:
                    raise TransportError(
                        f"etcd does not answer at {self.endpoints}: {again}",
                        hint="start etcd, or set ETCD_ENDPOINTS to where it answers",
                    ) from again
            except TransportError as error:
                if accept is None or _status(error.__cause__)[0] != accept:
                    raise
                return None, tries
            await asyncio.sleep(PAUSE_S)

    @asynccontextmanager
    async def _attempt(self) -> AsyncIterator[tuple[_Member, tuple[tuple[str, str], ...]]]:
        """The endpoint in use, and the metadata for a call on it. What gRPC raises inside becomes `_Again` (the next
        attempt may succeed: it has another endpoint or a new token) or `TransportError`."""
        if self._closed:
            raise TransportError("etcd client is closed")
        member, token = self._members[0], self._token
        try:
            if token is None:
                async with self._login_lock:
                    if self._token is None:
                        self._token = await self._login(member)
                    token = self._token
            require_leader = ("hasleader", "true")  # a member cut off from the others refuses: the next one may not
            yield member, (require_leader, ("token", token)) if token else (require_leader,)
        except (aio.AioRpcError, TimeoutError, asyncio.InvalidStateError) as error:
            code, text = _status(error)
            if self._username and text.endswith(_NEW_TOKEN_NEEDED):
                self._token = None if self._token == token else self._token
            elif code not in _TRANSIENT:
                access = any(word in text for word in ("user name", "authentication", "permission"))
                hint = "check the user name and password for etcd" if access else None
                raise TransportError(f"etcd refused at {member.url}: {text}", hint=hint) from error
            else:
                if self._reached and not self._down:
                    log.warning("etcd does not answer at %s: %s; trying on", member.url, text)
                    self._down = True
                if self._members[0] is member:
                    self._members.append(self._members.pop(0))
            raise _Again(text) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():  # gRPC's own, for a channel that closed
                raise TransportError("etcd client is closed") from None
            raise

    async def _login(self, member: _Member) -> str:
        request = rpc.AuthenticateRequest(name=self._username, password=self._password)
        try:
            return str((await member.stubs.auth.Authenticate(request, timeout=TRY_S)).token)
        except aio.AioRpcError as error:
            if error.code() == StatusCode.FAILED_PRECONDITION:
                return ""  # this etcd has no users
            raise


class Lease:
    """A lease that keeps itself alive, and the keys registered under it.

    When etcd loses it (it expired while etcd or the network was down, etcd was wiped, somebody revoked it), it is
    granted again under the same id, and all its keys are put again.
    """

    def __init__(self, etcd: Etcd, lease_id: LeaseId, ttl_s: int) -> None:
        self.id, self.ttl_s = lease_id, ttl_s
        self._etcd = etcd
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
            await self._etcd.delete(key)

    async def revoke(self) -> None:
        """End the lease, and with it its keys, at once; after a `TransportError`, when its TTL is over."""
        self.keeper.cancel()
        await asyncio.gather(self.keeper, return_exceptions=True)
        await self._etcd.revoke(self.id)

    async def _keep_alive(self) -> None:
        while True:
            try:
                with suppress(_Again):
                    await self._beat()
            except TransportError as error:
                log.warning("etcd lease %x: %s", self.id, error.message)
            except Exception:
                log.exception("etcd lease %x: keep-alive failed; trying on", self.id)
            await asyncio.sleep(PAUSE_S)

    async def _beat(self) -> None:
        """Keep the lease alive over one stream, until that breaks."""
        async with self._etcd._attempt() as (member, metadata):
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
        await self._etcd._call(lambda stubs: stubs.lease.LeaseGrant, request, None, exists)
        self._missing = dict(self._keys)

    async def _register(self) -> None:
        while self._missing:
            key, value = next(iter(self._missing.items()))
            request = rpc.PutRequest(key=key.encode(), value=value, lease=self.id)
            no_lease = StatusCode.NOT_FOUND
            reply, _ = await self._etcd._call(lambda stubs: stubs.kv.Put, request, None, no_lease)
            if reply is None:
                await self._restore()
            else:
                del self._missing[key]


class _Again(Exception):
    """An attempt failed in a way that another may not."""


class _Member:
    """One endpoint of the cluster; its channel opens when first used."""

    def __init__(self, url: str, ca: bytes | None, cert: bytes | None, key: bytes | None) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            host, port = parts.hostname, parts.port or 2379
        except ValueError:
            host, port = None, 0
        if not host or parts.scheme not in ("http", "https"):
            raise ConfigError(
                f"not an etcd endpoint: {url!r}", hint="write it as http://host:2379 or https://host:2379"
            )
        self.url = f"{parts.scheme}://{parts.netloc}"
        self._target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._tls = grpc.ssl_channel_credentials(ca, key, cert) if parts.scheme == "https" else None

    @cached_property
    def stubs(self) -> Any:
        if self._tls is None:
            channel = aio.insecure_channel(self._target, options=_CHANNEL_OPTIONS)
        else:
            channel = aio.secure_channel(self._target, self._tls, options=_CHANNEL_OPTIONS)
        services = {"kv": rpc.KVStub, "lease": rpc.LeaseStub, "watch": rpc.WatchStub, "auth": rpc.AuthStub}
        return SimpleNamespace(channel=channel, **{name: stub(channel) for name, stub in services.items()})

    async def close(self) -> None:
        if "stubs" in self.__dict__:
            await self.stubs.channel.close()


def _status(error: Any) -> tuple[Any, str]:
    """The gRPC status of what gRPC raised, and what it says."""
    if not isinstance(error, aio.AioRpcError):
        return StatusCode.UNAVAILABLE, "no answer"
    text = str(error.details() or "no answer")
    return error.code(), text.removeprefix("failed to connect to all addresses; last error: ")


def _range_of(prefix: str) -> tuple[bytes, bytes]:
    """etcd's half-open range of the keys that begin with `prefix`; `(0, 0)` is all keys."""
    if not prefix:
        return b"\0", b"\0"
    name = prefix.encode()
    return name, name[:-1] + bytes([name[-1] + 1])  # UTF-8 has no byte 0xff: nothing to carry


def _key_value(item: Any) -> KeyValue:
    return KeyValue(item.key.decode(), item.value, item.mod_revision)
