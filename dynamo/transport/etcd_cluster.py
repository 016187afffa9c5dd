"""The endpoints of an etcd cluster, and calls that try one after the other until etcd answers.

A unary call is `Cluster.call`, which retries. For a streaming call, `start_attempt` chooses the endpoint and
`Attempt.run` awaits each step; its user retries on RetryableError.

gRPC is used through `grpc.aio`, etcd's messages through the generated stubs of `aetcd`; no other file imports either.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Awaitable, Callable
from functools import cached_property
from types import SimpleNamespace
from typing import Any, TypeVar
from urllib.parse import urlsplit

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # it does not help here, and gRPC warns at every subprocess

import aetcd.rpc
import grpc
import grpc.aio

from dynamo.errors import ConfigError, TransportError
from dynamo.transport.credentials import ETCD_TLS_VARIABLES, ETCD_VARIABLES, EtcdCredentials
from dynamo.transport.network import without_credentials

log = logging.getLogger(__name__)
T = TypeVar("T")
aio: Any = grpc.aio
StatusCode: Any = grpc.StatusCode
rpc: Any = aetcd.rpc  # protobuf makes these classes at run time: no type checker sees them

ATTEMPT_TIMEOUT_S = 1.5
"""Limit of one attempt; a call may make several, on one endpoint after the other."""
PAUSE_S = 0.1
"""Pause between two attempts."""
FIRST_CONTACT_S = 2.0
"""A client that never reached etcd gives up after that: the address may be wrong."""
_CHANNEL_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),  # gRPC's default is two minutes
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


class RefusedError(TransportError):
    """etcd refused a call: for its credentials, or as wrong."""


class RetryableError(Exception):
    """An attempt failed, and the next one may succeed: it uses another endpoint or a new token."""


class Attempt:
    """One attempt of a call: on one endpoint, with one token. `run` awaits gRPC and translates its errors."""

    def __init__(self, cluster: Cluster, member: Member, token: str | None) -> None:
        self.member = member
        self.token = token
        """empty: etcd has no users; None: not logged in yet"""
        self._cluster = cluster

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata for every call of this attempt."""
        require_leader = ("hasleader", "true")  # a member cut off from the others refuses: the next one may not
        return (require_leader, ("token", self.token)) if self.token else (require_leader,)

    async def run(self, work: Awaitable[T]) -> T:
        """Await gRPC.

        Raises RetryableError if the next attempt may succeed, after selecting another endpoint or dropping the token;
        TransportError if etcd refuses, or the client is closed.
        """
        try:
            return await work
        except (aio.AioRpcError, TimeoutError, asyncio.InvalidStateError) as error:
            raise self._cluster.failed(self, error) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._cluster.closed and task is not None and not task.cancelling():  # gRPC's own, for a closed channel
                raise TransportError("etcd client is closed") from None
            raise


class Cluster:
    """One or several endpoints of one etcd cluster. When one fails, the next one is used.

    After `closed` is set, every call raises `TransportError`.
    """

    def __init__(self, endpoints: str, credentials: EtcdCredentials, timeout_s: float) -> None:
        """Raises ConfigError for an invalid address. `timeout_s` is the default of every call."""
        shown = without_credentials(endpoints)
        self._members = [Member(url, credentials, shown) for url in filter(None, map(str.strip, endpoints.split(",")))]
        """the first is the one in use"""
        if not self._members:
            raise ConfigError("no etcd endpoint given", hint="set ETCD_ENDPOINTS, such as http://127.0.0.1:2379")
        self._urls = ",".join(member.url for member in self._members)
        self.timeout_s = timeout_s
        self.closed = False
        self._credentials = credentials
        self._token = None if credentials.username else ""  # None: log in first; tokens are lost when etcd restarts
        self._login_lock = asyncio.Lock()
        self._was_reached = False
        self._is_down = False

    async def close(self) -> None:
        """Close all connections. Calls in flight raise `TransportError`."""
        self.closed = True
        await asyncio.gather(*(member.close() for member in self._members))

    async def call(
        self,
        method: Callable[[Any], Any],
        request: Any,
        timeout_s: float | None = None,
        accept: Any = None,
    ) -> tuple[Any, int]:
        """Call etcd until it answers; return the reply and the number of attempts.

        The reply is None if etcd refuses with the status `accept`. Raises TransportError if it refuses with another one,
        or has not answered after `timeout_s`.
        """
        allowed_s = self.timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + (allowed_s if self._was_reached else min(allowed_s, FIRST_CONTACT_S))
        for attempts in itertools.count(1):
            try:
                return await self._call_once(method, request, deadline), attempts
            except RetryableError as error:
                if time.monotonic() + PAUSE_S > deadline:
                    raise TransportError(
                        f"etcd does not answer at {self._urls}: {error}",
                        hint=self._unreached_hint(),
                    ) from error
            except TransportError as error:
                if accept is None or _status(error.__cause__)[0] != accept:
                    raise
                return None, attempts
            await asyncio.sleep(PAUSE_S)
        raise AssertionError("unreachable")

    def _unreached_hint(self) -> str:
        hint = "start etcd, or set ETCD_ENDPOINTS to where it answers"
        return f"{hint}; for https, set {ETCD_TLS_VARIABLES} too" if "https://" in self._urls else hint

    async def _call_once(self, method: Callable[[Any], Any], request: Any, deadline: float) -> Any:
        attempt = await self.start_attempt()
        left_s = max(deadline - time.monotonic(), PAUSE_S)
        call = method(attempt.member.stubs)(request, metadata=attempt.metadata, timeout=min(left_s, ATTEMPT_TIMEOUT_S))
        reply = await attempt.run(call)
        if self._is_down:
            log.info("etcd answers again at %s", attempt.member.url)
        self._was_reached = True
        self._is_down = False
        return reply

    async def start_attempt(self) -> Attempt:
        """Return an attempt on the endpoint in use, logged in. Raises what `Attempt.run` does."""
        if self.closed:
            raise TransportError("etcd client is closed")
        attempt = Attempt(self, self._members[0], self._token)
        if attempt.token is None:
            async with self._login_lock:
                if self._token is None:
                    self._token = await attempt.run(self._log_in(attempt.member))
                attempt.token = self._token
        return attempt

    async def _log_in(self, member: Member) -> str:
        """Return a token; empty if this etcd has no users."""
        request = rpc.AuthenticateRequest(name=self._credentials.username, password=self._credentials.password)
        try:
            return str((await member.stubs.auth.Authenticate(request, timeout=ATTEMPT_TIMEOUT_S)).token)
        except aio.AioRpcError as error:
            if error.code() == StatusCode.FAILED_PRECONDITION:
                return ""
            raise

    def failed(self, attempt: Attempt, error: Exception) -> RetryableError | TransportError:
        """Return what a failed attempt raises; prepare the next one, with a new token or on the next endpoint."""
        code, text = _status(error)
        if self._credentials.username and text.endswith(_NEW_TOKEN_NEEDED):
            if self._token == attempt.token:
                self._token = None
            return RetryableError(text)
        if code not in _TRANSIENT:
            access = any(word in text for word in ("user name", "authentication", "permission"))
            hint = f"set the credentials that it accepts: {ETCD_VARIABLES}" if access else None
            return RefusedError(f"etcd refused at {attempt.member.url}: {text}", hint=hint)
        if self._was_reached and not self._is_down:
            log.warning("etcd does not answer at %s: %s; retrying", attempt.member.url, text)
            self._is_down = True
        if self._members[0] is attempt.member:
            self._members.append(self._members.pop(0))
        return RetryableError(text)


class Member:
    """One endpoint of the cluster. Its channel opens at the first use."""

    def __init__(self, url: str, credentials: EtcdCredentials, shown: str) -> None:
        """Raises ConfigError, which names all endpoints as `shown`, for an invalid address."""
        scheme = "https" if credentials.ca or credentials.cert else "http"
        parts = urlsplit(url if "://" in url else f"{scheme}://{url}")
        try:
            host = parts.hostname
            port = parts.port or 2379
        except ValueError:
            host = None
            port = 0
        if not host or parts.scheme not in ("http", "https"):
            raise ConfigError(
                f"not an etcd endpoint: {shown!r}", hint="write it as http://host:2379 or https://host:2379"
            )
        self.url = without_credentials(f"{parts.scheme}://{parts.netloc}")
        self._target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._tls = None
        if parts.scheme == "https":
            self._tls = grpc.ssl_channel_credentials(credentials.ca, credentials.key, credentials.cert)

    @cached_property
    def stubs(self) -> Any:
        """The channel and etcd's services on it: `kv`, `lease`, `watch`, `auth`."""
        if self._tls is None:
            channel = aio.insecure_channel(self._target, options=_CHANNEL_OPTIONS)
        else:
            channel = aio.secure_channel(self._target, self._tls, options=_CHANNEL_OPTIONS)
        services = {"kv": rpc.KVStub, "lease": rpc.LeaseStub, "watch": rpc.WatchStub, "auth": rpc.AuthStub}
        return SimpleNamespace(channel=channel, **{name: stub(channel) for name, stub in services.items()})

    async def close(self) -> None:
        """Close the channel, if it is open."""
        if "stubs" in self.__dict__:
            await self.stubs.channel.close()


def _status(error: Any) -> tuple[Any, str]:
    """Return the gRPC status and message of an error; UNAVAILABLE for a timeout."""
    if not isinstance(error, aio.AioRpcError):
        return StatusCode.UNAVAILABLE, "no answer"
    text = str(error.details() or "no answer")
    return error.code(), text.removeprefix("failed to connect to all addresses; last error: ")
