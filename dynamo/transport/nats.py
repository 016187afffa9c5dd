"""NATS: events, work queues and, if configured, requests. Only `nats_import` imports nats-py.

A request is answered by an empty message (accepted) or by a packed Failure. NATS itself answers at once when a subject has
no subscriber, which is the cheapest sign that an instance has ended.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from dynamo.errors import NoInstancesError, TransportError
from dynamo.transport.credentials import NATS_VARIABLES, nats_credentials
from dynamo.transport.nats_import import Msg, NatsConnection, Subscription, errors
from dynamo.transport.network import without_credentials

log = logging.getLogger(__name__)
T = TypeVar("T")

DEFAULT_URL = "nats://localhost:4222"
NATS_CONNECT_TIMEOUT_S = 2.0
CANCEL_AGAIN_S = 0.1
RECONNECT_WAIT_S = 0.1
PING_INTERVAL_S = 3
"""A server that hangs, or a link that is cut, is given up after three pings without an answer."""
STATUS_NO_RESPONDERS = "503"
PENDING_BYTES = 64 << 20
"""Limit of what waits here to be sent: a server that hangs reads nothing before it is given up."""
LISTENER_MESSAGES = 1 << 16
LISTENER_BYTES = 256 << 20
"""Limits of what waits here for one listener."""
FLUSH_TIMEOUT_S = 2
CLOSE_TIMEOUT_S = 2.0

Handler = Callable[[str, bytes, Callable[[bytes], Awaitable[None]]], Awaitable[None]]
"""Called with subject, data, and a function that sends the answer."""


class NatsMessage(NamedTuple):
    """A message. `reply` is the subject for an answer; `status` is set if the server itself sent it, without data."""

    subject: str
    data: bytes
    reply: str
    status: str


class NatsListener:
    """A handler that is called for messages until `close` or `drain`."""

    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription

    async def close(self) -> None:
        """Unsubscribe. No-op if it or the connection is closed."""
        with suppress(errors.Error):
            await self._subscription.unsubscribe()

    async def drain(self) -> None:
        """Unsubscribe once the handler has processed everything that was sent until now."""
        with suppress(errors.Error, TimeoutError):
            await asyncio.wait_for(self._subscription.drain(), FLUSH_TIMEOUT_S)  # type: ignore[no-untyped-call]
        await self.close()


class Nats:
    """A connection to NATS, which reconnects by itself. While disconnected, requests and `publish` fail immediately."""

    def __init__(self, connection: NatsConnection, shown_urls: str) -> None:
        """`shown_urls` names the servers in errors and logs, without credentials."""
        self._connection = connection
        self._shown_urls = shown_urls
        self._connected = asyncio.Event()
        self._connected.set()
        self._lost_at = 0.0
        self.closing = False
        self.session = 1
        """counts the connections: it changes when the server has forgotten what it had of this client"""
        self._inbox = connection.new_inbox()
        self._replies: dict[str, asyncio.Future[bytes]] = {}
        self._tokens = 0
        self._slow_subscriptions: set[int] = set()

    @classmethod
    async def connect(cls, url: str = DEFAULT_URL, *, name: str = "dynamo") -> Nats:
        """Connect to one of the servers in `url`, separated by commas, with the credentials in it or of `NATS_AUTH_*`.

        Raises TransportError within `NATS_CONNECT_TIMEOUT_S`, ConfigError for credentials that cannot be read.
        """
        credentials = nats_credentials(url)
        urls = [u.strip() for u in url.split(",") if u.strip()]
        self = cls(NatsConnection(), without_credentials(url))
        last_error = ""

        async def on_error(error: Exception) -> None:
            nonlocal last_error
            if not _is_refusal(last_error):  # a server that refuses may reset the connection before that is read
                last_error = str(error) or type(error).__name__
            if isinstance(error, errors.SlowConsumerError) and error.sid not in self._slow_subscriptions:
                self._slow_subscriptions.add(error.sid)
                log.warning("messages on %s are dropped: their listener is too slow", error.subject)
            log.debug("nats: %s", error)

        try:
            await _within(
                NATS_CONNECT_TIMEOUT_S,
                self._connection.connect(
                    servers=urls,
                    name=name,
                    error_cb=on_error,
                    disconnected_cb=self._on_disconnected,
                    reconnected_cb=self._on_reconnected,
                    reconnect_time_wait=RECONNECT_WAIT_S,  # type: ignore[arg-type]  # any number of seconds
                    max_reconnect_attempts=-1,
                    allow_reconnect=True,
                    ping_interval=PING_INTERVAL_S,
                    connect_timeout=2,
                    pending_size=PENDING_BYTES,
                    **credentials,
                ),
            )
            await self._connection.subscribe(f"{self._inbox}.*", cb=self._on_reply)
        except (TimeoutError, OSError, errors.Error) as error:
            self.closing = True
            await self._connection.close()
            reason = last_error or str(error) or type(error).__name__
            hint = "start a NATS server, set NATS_SERVER, or let `dynamo serve --infra embedded` start one"
            if _is_refusal(reason):
                hint = f"set the credentials that it accepts: {NATS_VARIABLES}"
            raise TransportError(f"cannot connect to NATS at {self._shown_urls}: {reason}", hint=hint) from None
        return self

    async def _on_disconnected(self) -> None:
        if self.closing:
            return
        if self.connected:
            self._lost_at = time.monotonic()
        self._connected.clear()
        for reply in self._replies.values():
            _fail_reply(reply, "the connection to the NATS server was lost")
        log.warning("lost the NATS server at %s; reconnecting", self._shown_urls)

    async def _on_reconnected(self) -> None:
        self._connected.set()
        self.session += 1
        log.info("reconnected to the NATS server")

    @property
    def max_payload_bytes(self) -> int:
        """The largest message that the server accepts."""
        return self._connection.max_payload

    @property
    def connected(self) -> bool:
        """True unless the connection was lost and is not back yet."""
        return self._connected.is_set()

    @property
    def away_s(self) -> float:
        """Seconds since the connection was lost; 0 while connected."""
        return 0.0 if self.connected else time.monotonic() - self._lost_at

    async def wait_connected(self, timeout_s: float) -> None:
        """Wait until connected. Raises TransportError after `timeout_s`."""
        if not self.connected:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._connected.wait()
            except TimeoutError:
                raise self._unavailable() from None

    # -- requests

    async def request(
        self, subject: str, payload: bytes, timeout_s: float, reply: asyncio.Future[bytes] | None = None
    ) -> bytes:
        """Send a request and return its answer. The wait ends, too, when the given `reply` is completed elsewhere.

        Raises NoInstancesError if `subject` has no subscriber, TransportError while disconnected or without an answer
        in time.
        """
        if not self.connected:
            raise self._unavailable()
        loop = asyncio.get_running_loop()
        reply = reply or loop.create_future()
        self._tokens += 1
        token = str(self._tokens)
        self._replies[token] = reply
        timer = loop.call_later(timeout_s, _fail_reply, reply, f"no answer on {subject} within {timeout_s:.1f} s")
        try:
            await self._connection.publish(subject, payload, reply=f"{self._inbox}.{token}")
            return await reply
        except errors.NoRespondersError:
            raise NoInstancesError(f"no subscriber on {subject}") from None
        except errors.Error as error:
            raise TransportError(f"NATS request on {subject}: {error}") from None
        finally:
            timer.cancel()
            del self._replies[token]

    async def _on_reply(self, message: Msg) -> None:
        reply = self._replies.get(message.subject.rpartition(".")[2])
        if reply is None or reply.done():
            return
        if message.headers and message.headers.get("Status") == STATUS_NO_RESPONDERS:
            reply.set_exception(errors.NoRespondersError())
        else:
            reply.set_result(message.data)

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Subscription:
        """Call `handler(subject, data, respond)` for each message; of subscribers with the same `queue`, one gets each.

        Messages are handled one after the other: long work belongs in a task.
        """

        async def deliver(message: Msg) -> None:
            try:
                await handler(message.subject, message.data, message.respond)
            except Exception:
                log.exception("handler of %s failed", subject)

        return await self._connection.subscribe(
            subject, queue=queue, cb=deliver, pending_msgs_limit=1 << 20, pending_bytes_limit=1 << 30
        )

    # -- events

    def new_inbox(self) -> str:
        """Return a subject that no other client has."""
        return self._connection.new_inbox()

    def check_size(self, subject: str, size_bytes: int) -> None:
        """Raise TransportError for a message that is larger than the server accepts."""
        if size_bytes > self.max_payload_bytes:
            raise TransportError(
                f"cannot publish on {subject}: {size_bytes} bytes, the NATS server takes {self.max_payload_bytes}",
                hint="publish smaller messages, or raise max_payload of the NATS server",
            )

    async def publish(self, subject: str, payload: bytes, reply: str = "") -> None:
        """Publish a message; `reply` is the subject for answers.

        Raises TransportError while disconnected, when the send buffer is full, or when the message is too large.
        """
        connection = self._connection
        if not connection.is_connected:
            raise self._unavailable()
        self.check_size(subject, len(payload))
        if connection.pending_data_size + len(payload) > PENDING_BYTES:
            raise TransportError(
                f"cannot publish on {subject}: the NATS server reads too slowly and the send buffer is full",
                hint="publish less",
            )
        try:
            await connection.publish(subject, payload, reply)
        except errors.Error as error:
            raise TransportError(f"cannot publish on {subject}: {error}") from None

    async def listen(self, subject: str, handler: Callable[[bytes], None]) -> NatsListener:
        """Call `handler(data)`, which must not raise, for each message that is published once this has returned.

        Messages that wait for a busy handler are dropped above `LISTENER_MESSAGES` or `LISTENER_BYTES`. While
        disconnected, listening begins at the reconnect.
        """

        async def deliver(message: Msg) -> None:
            handler(message.data)

        return await self._listen(subject, deliver)

    async def listen_raw(self, subject: str, handler: Callable[[NatsMessage], None]) -> NatsListener:
        """Listen like `listen`, and pass the whole message."""

        async def deliver(message: Msg) -> None:
            status = (message.headers or {}).get("Status", "")
            handler(NatsMessage(message.subject, message.data, message.reply, status))

        return await self._listen(subject, deliver)

    async def _listen(self, subject: str, deliver: Callable[[Msg], Awaitable[None]]) -> NatsListener:
        try:
            subscription = await self._connection.subscribe(
                subject, cb=deliver, pending_msgs_limit=LISTENER_MESSAGES, pending_bytes_limit=LISTENER_BYTES
            )
        except errors.Error as error:
            raise TransportError(f"cannot listen on {subject}: {error}") from None
        if self._connection.is_connected:
            with suppress(errors.Error):  # disconnected meanwhile: nats-py subscribes again at the reconnect
                await self._connection.flush(FLUSH_TIMEOUT_S)
        return NatsListener(subscription)

    async def flush(self) -> None:
        """Wait until the server has processed everything that was sent, subscriptions included."""
        await self._connection.flush()

    async def close(self) -> None:
        """Deliver what is pending, for at most `CLOSE_TIMEOUT_S`, then disconnect."""
        self.closing = True
        try:
            await asyncio.wait_for(self._connection.drain(), CLOSE_TIMEOUT_S)
        except (TimeoutError, errors.Error):
            await self._connection.close()

    def _unavailable(self) -> TransportError:
        return TransportError(
            f"the NATS server at {self._shown_urls} is unavailable", hint="try again in a few seconds"
        )


def _is_refusal(reason: str) -> bool:
    return "authorization" in reason.lower()


def _fail_reply(reply: asyncio.Future[bytes], reason: str) -> None:
    if not reply.done():
        reply.set_exception(TransportError(reason))


async def _within(timeout_s: float, work: Coroutine[Any, Any, T]) -> T:
    """Await `work` for at most `timeout_s` seconds. Raises TimeoutError.

    It is cancelled until it ends: nats-py retries without end, and loses a cancellation that meets a time limit of its own.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=timeout_s)
    finally:
        while not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=CANCEL_AGAIN_S)
    if task.cancelled():
        raise TimeoutError(f"no answer in {timeout_s:g} s")
    return task.result()
