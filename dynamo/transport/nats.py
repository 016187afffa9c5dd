"""Messages and, where it is asked for, requests over NATS: the one file that uses nats-py.

A request is answered by an empty message (accepted) or by a packed Failure. NATS itself says at once when nobody listens
on a subject, which is the cheapest sign that an instance has gone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NamedTuple

from dynamo.errors import NoInstancesError, TransportError
from dynamo.transport.nats_import import Msg, NatsConnection, Subscription, errors
from dynamo.transport.network import without_credentials

logger = logging.getLogger(__name__)

DEFAULT_URL = "nats://localhost:4222"
CONNECT_TIMEOUT_S = 2.0
RECONNECT_WAIT_S = 0.1
PING_S = 3  # a server that hangs, or a link that is cut, is given up after three of them
NO_RESPONDERS = "503"
PENDING_BYTES = 64 << 20
"""what may wait here to be sent: a server that hangs takes nothing and is not yet known to be away"""
LISTENER_MESSAGES, LISTENER_BYTES = 1 << 16, 256 << 20
"""what may wait here for one listener"""
FLUSH_TIMEOUT_S = 2

Handler = Callable[[str, bytes, Callable[[bytes], Awaitable[None]]], Awaitable[None]]


class Message(NamedTuple):
    """What came: `reply` is where an answer goes, `status` what the server itself says instead of a message."""

    subject: str
    data: bytes
    reply: str
    status: str


class Listening:
    """A handler that is called for messages until this is closed."""

    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription

    async def close(self) -> None:
        """A second time, or after the connection, does nothing."""
        with suppress(errors.Error):
            await self._subscription.unsubscribe()

    async def drain(self) -> None:
        """The same, once the handler has had all that was sent until now."""
        with suppress(errors.Error, TimeoutError):
            await asyncio.wait_for(self._subscription.drain(), FLUSH_TIMEOUT_S)  # type: ignore[no-untyped-call]
        await self.close()


class Nats:
    """One connection. It reconnects for ever by itself; requests made meanwhile, or in flight then, fail at once."""

    def __init__(self, connection: NatsConnection, place: str) -> None:
        """`place`: what is told of where the server is."""
        self._connection, self._place = connection, place
        self._connected = asyncio.Event()
        self._connected.set()
        self._lost_at = 0.0
        self.closing = False
        self.session = 1
        """counts the times that it connected"""
        self._inbox = connection.new_inbox()
        self._replies: dict[str, asyncio.Future[bytes]] = {}
        self._tokens = 0
        self._slow: set[int] = set()

    @classmethod
    async def connect(cls, url: str = DEFAULT_URL, *, name: str = "dynamo") -> Nats:
        """`url` may list several servers with commas. Raises TransportError within `CONNECT_TIMEOUT_S`."""
        urls = [u.strip() for u in url.split(",") if u.strip()]
        self = cls(NatsConnection(), without_credentials(url))
        last: list[str] = []

        async def failed(error: Exception) -> None:
            last[:] = [str(error) or type(error).__name__]
            if isinstance(error, errors.SlowConsumerError) and error.sid not in self._slow:
                self._slow.add(error.sid)
                logger.warning("messages on %s are dropped: what listens to them is too slow", error.subject)
            logger.debug("nats: %s", last[0])

        async def lost() -> None:
            if self.closing:
                return
            if self.connected:
                self._lost_at = time.monotonic()
            self._connected.clear()
            for reply in self._replies.values():
                self._fail(reply, "the connection to the NATS server was lost")
            logger.warning("lost the NATS server at %s; reconnecting", self._place)

        async def back() -> None:
            self._connected.set()
            self.session += 1
            logger.info("connected to the NATS server again")

        try:
            await asyncio.wait_for(
                self._connection.connect(
                    servers=urls,
                    name=name,
                    error_cb=failed,
                    disconnected_cb=lost,
                    reconnected_cb=back,
                    reconnect_time_wait=RECONNECT_WAIT_S,  # type: ignore[arg-type]  # any number of seconds
                    max_reconnect_attempts=-1,
                    allow_reconnect=True,
                    ping_interval=PING_S,
                    connect_timeout=2,
                    pending_size=PENDING_BYTES,
                ),
                CONNECT_TIMEOUT_S,
            )
            await self._connection.subscribe(f"{self._inbox}.*", cb=self._answered)
        except (TimeoutError, OSError, errors.Error) as error:
            self.closing = True
            await self._connection.close()
            reason = last[0] if last else str(error) or type(error).__name__
            raise TransportError(
                f"cannot connect to NATS at {self._place}: {reason}",
                hint="start a NATS server, set NATS_SERVER, or let `dynamo serve --infra embedded` start one",
            ) from None
        return self

    @property
    def max_payload_bytes(self) -> int:
        return self._connection.max_payload

    @property
    def connected(self) -> bool:
        return self._connected.is_set()

    @property
    def away_s(self) -> float:
        """How long the server has been away; 0 while it is there."""
        return 0.0 if self.connected else time.monotonic() - self._lost_at

    async def wait_connected(self, timeout_s: float) -> None:
        """Raises TransportError when the server is away for longer than that."""
        if not self.connected:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._connected.wait()
            except TimeoutError:
                raise self._away() from None

    async def request(
        self, subject: str, payload: bytes, timeout_s: float, reply: asyncio.Future[bytes] | None = None
    ) -> bytes:
        """The answer to one request; whoever has `reply` may end the wait for it.

        Raises NoInstancesError when nobody listens on `subject`, TransportError when the server is away or no answer
        came in time.
        """
        if not self.connected:
            raise self._away()
        loop = asyncio.get_running_loop()
        reply = reply or loop.create_future()
        self._tokens += 1
        token = str(self._tokens)
        self._replies[token] = reply
        timer = loop.call_later(timeout_s, self._fail, reply, f"no answer on {subject} within {timeout_s:.1f} s")
        try:
            await self._connection.publish(subject, payload, reply=f"{self._inbox}.{token}")
            return await reply
        except errors.NoRespondersError:
            raise NoInstancesError(f"nobody listens on {subject}") from None
        except errors.Error as error:
            raise TransportError(f"NATS request on {subject}: {error}") from None
        finally:
            timer.cancel()
            del self._replies[token]

    async def _answered(self, message: Msg) -> None:
        reply = self._replies.get(message.subject.rpartition(".")[2])
        if reply is None or reply.done():
            return
        if message.headers and message.headers.get("Status") == NO_RESPONDERS:
            reply.set_exception(errors.NoRespondersError())
        else:
            reply.set_result(message.data)

    def _fail(self, reply: asyncio.Future[bytes], reason: str) -> None:
        if not reply.done():
            reply.set_exception(TransportError(reason))

    def _away(self) -> TransportError:
        return TransportError(f"the NATS server at {self._place} is away", hint="try again in a few seconds")

    def new_inbox(self) -> str:
        """A subject that no other client has."""
        return self._connection.new_inbox()

    def check_size(self, subject: str, size_bytes: int) -> None:
        """Raises TransportError when the server takes no message of this size."""
        if size_bytes > self.max_payload_bytes:
            raise TransportError(
                f"cannot publish on {subject}: {size_bytes} bytes, the NATS server takes {self.max_payload_bytes}",
                hint="publish smaller messages, or raise max_payload of the NATS server",
            )

    async def publish(self, subject: str, payload: bytes, reply: str = "") -> None:
        """Raises TransportError when the server is away, does not take what is sent, or takes no message of this size."""
        connection = self._connection
        if not connection.is_connected:
            raise self._away()
        self.check_size(subject, len(payload))
        if connection.pending_data_size + len(payload) > PENDING_BYTES:
            raise TransportError(f"cannot publish on {subject}: the NATS server takes nothing", hint="publish less")
        try:
            await connection.publish(subject, payload, reply)
        except errors.Error as error:
            raise TransportError(f"cannot publish on {subject}: {error}") from None

    async def listen(self, subject: str, handler: Callable[[bytes], None]) -> Listening:
        """Call `handler(data)`, which must not raise, for each message that is published once this has returned.

        Messages that wait while it is busy are dropped from `LISTENER_MESSAGES` or `LISTENER_BYTES` on. While the server
        is away, listening begins when it is back.
        """

        async def deliver(message: Msg) -> None:
            handler(message.data)

        return await self._listen(subject, deliver)

    async def receive(self, subject: str, handler: Callable[[Message], None]) -> Listening:
        """As `listen`, with all that there is to know of a message."""

        async def deliver(message: Msg) -> None:
            status = (message.headers or {}).get("Status", "")
            handler(Message(message.subject, message.data, message.reply, status))

        return await self._listen(subject, deliver)

    async def _listen(self, subject: str, deliver: Callable[[Msg], Awaitable[None]]) -> Listening:
        try:
            subscription = await self._connection.subscribe(
                subject, cb=deliver, pending_msgs_limit=LISTENER_MESSAGES, pending_bytes_limit=LISTENER_BYTES
            )
        except errors.Error as error:
            raise TransportError(f"cannot listen on {subject}: {error}") from None
        if self._connection.is_connected:
            with suppress(errors.Error):  # lost meanwhile: it subscribes again when it is back
                await self._connection.flush(FLUSH_TIMEOUT_S)
        return Listening(subscription)

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Subscription:
        """Call `handler(subject, data, respond)` for each message, one after the other: it must hand long work to a task."""

        async def deliver(message: Msg) -> None:
            try:
                await handler(message.subject, message.data, message.respond)
            except Exception:
                logger.exception("handler of %s failed", subject)

        return await self._connection.subscribe(
            subject, queue=queue, cb=deliver, pending_msgs_limit=1 << 20, pending_bytes_limit=1 << 30
        )

    async def flush(self) -> None:
        """Return when the server has processed what was sent, subscriptions included."""
        await self._connection.flush()

    async def close(self) -> None:
        """Deliver what is pending, then disconnect."""
        self.closing = True
        try:
            await asyncio.wait_for(self._connection.drain(), 2.0)
        except (TimeoutError, errors.Error):
            await self._connection.close()
