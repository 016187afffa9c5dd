"""The endpoints of an etcd cluster, and calls that try one after the other until etcd answers.

gRPC comes in through `grpc.aio`, etcd's messages from the generated stubs of `aetcd`; no other file imports either.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import urlsplit

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # it does not help, and gRPC complains at every subprocess

import aetcd.rpc
import grpc
import grpc.aio

from dynamo.errors import ConfigError, TransportError
from dynamo.transport.network import without_credentials

log = logging.getLogger(__name__)
aio: Any = grpc.aio
StatusCode: Any = grpc.StatusCode
rpc: Any = aetcd.rpc  # protobuf makes these classes at run time: no type checker sees them

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


class Tls(NamedTuple):
    """Of `https://` endpoints, in PEM: authorities (None: the system's), and what identifies this client, if anything."""

    ca: bytes | None = None
    cert: bytes | None = None
    key: bytes | None = None


class Cluster:
    """One or several endpoints of one cluster, taken in turn when one fails.

    After `closed` is set, every call raises `TransportError`.
    """

    def __init__(self, endpoints: str, tls: Tls, username: str, password: str, timeout_s: float) -> None:
        """Raises ConfigError for an address that is none. `timeout_s` is each call's unless it says otherwise."""
        shown = without_credentials(endpoints)
        self._members = [Member(url, tls, shown) for url in filter(None, map(str.strip, endpoints.split(",")))]
        """The first is the one in use."""
        if not self._members:
            raise ConfigError("no etcd endpoint given", hint="set ETCD_ENDPOINTS, such as http://127.0.0.1:2379")
        self._urls = ",".join(member.url for member in self._members)
        self.timeout_s, self.closed = timeout_s, False
        self._username, self._password = username, password
        self._token = None if username else ""  # None: log in first; tokens die with etcd
        self._login_lock = asyncio.Lock()
        self._reached = self._down = False

    async def close(self) -> None:
        """End the connections; calls in flight raise `TransportError`."""
        self.closed = True
        await asyncio.gather(*(member.close() for member in self._members))

    async def call(
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
                async with self.attempt() as (member, metadata):
                    left_s = max(deadline - time.monotonic(), PAUSE_S)
                    reply = await method(member.stubs)(request, metadata=metadata, timeout=min(left_s, TRY_S))
                if self._down:
                    log.info("etcd answers again at %s", member.url)
                self._reached, self._down = True, False
                return reply, tries
            except Again as again:
                if time.monotonic() + PAUSE_S > deadline:
                    raise TransportError(
                        f"etcd does not answer at {self._urls}: {again}",
                        hint="start etcd, or set ETCD_ENDPOINTS to where it answers",
                    ) from again
            except TransportError as error:
                if accept is None or _status(error.__cause__)[0] != accept:
                    raise
                return None, tries
            await asyncio.sleep(PAUSE_S)

    @asynccontextmanager
    async def attempt(self) -> AsyncIterator[tuple[Member, tuple[tuple[str, str], ...]]]:
        """The endpoint in use, and the metadata for a call on it. What gRPC raises inside becomes `Again` (the next
        attempt may succeed: it has another endpoint or a new token) or `TransportError`."""
        if self.closed:
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
            raise Again(text) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self.closed and task is not None and not task.cancelling():  # gRPC's own, for a channel that closed
                raise TransportError("etcd client is closed") from None
            raise

    async def _login(self, member: Member) -> str:
        request = rpc.AuthenticateRequest(name=self._username, password=self._password)
        try:
            return str((await member.stubs.auth.Authenticate(request, timeout=TRY_S)).token)
        except aio.AioRpcError as error:
            if error.code() == StatusCode.FAILED_PRECONDITION:
                return ""  # this etcd has no users
            raise


class Again(Exception):
    """An attempt failed in a way that another may not."""


class Member:
    """One endpoint of the cluster; its channel opens when first used."""

    def __init__(self, url: str, tls: Tls, shown: str) -> None:
        """`shown`: all of them, as errors may tell."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            host, port = parts.hostname, parts.port or 2379
        except ValueError:
            host, port = None, 0
        if not host or parts.scheme not in ("http", "https"):
            raise ConfigError(
                f"not an etcd endpoint: {shown!r}", hint="write it as http://host:2379 or https://host:2379"
            )
        self.url = without_credentials(f"{parts.scheme}://{parts.netloc}")
        self._target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._tls = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.cert) if parts.scheme == "https" else None

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
