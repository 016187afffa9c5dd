"""Requests over NATS: the one file that imports nats-py.

A request is answered by an empty message (accepted) or by a packed Failure. NATS itself says at once when nobody listens
on a subject, which is the cheapest sign that an instance has gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import nats
import nats.errors
from nats.aio.client import Client as NatsConnection
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from dynamo.errors import NoInstancesError, TransportError

logger = logging.getLogger(__name__)

DEFAULT_URL = "nats://localhost:4222"
CONNECT_TIMEOUT_S = 2.0
RECONNECT_WAIT_S = 0.1
PING_S = 5  # a server that hangs is given up after three of them
NO_RESPONDERS = "503"

Handler = Callable[[str, bytes, Callable[[bytes], Awaitable[None]]], Awaitable[None]]


class Nats:
    """One connection. It reconnects for ever by itself; requests made meanwhile, or in flight then, fail at once."""

    def __init__(self, connection: NatsConnection, urls: list[str]) -> None:
        self._connection, self._urls = connection, urls
        self._connected = asyncio.Event()
        self._connected.set()
        self._closing = False
        self._inbox = connection.new_inbox()
        self._replies: dict[str, asyncio.Future[bytes]] = {}
        self._tokens = 0

    @classmethod
    async def connect(cls, url: str = DEFAULT_URL, *, name: str = "dynamo") -> Nats:
        """`url` may list several servers with commas. Raises TransportError within `CONNECT_TIMEOUT_S`."""
        urls = [u.strip() for u in url.split(",") if u.strip()]
        self = cls(NatsConnection(), urls)
        last: list[str] = []

        async def failed(error: Exception) -> None:
            last[:] = [str(error) or type(error).__name__]
            logger.debug("nats: %s", last[0])

        async def lost() -> None:
            if self._closing:
                return
            self._connected.clear()
            for reply in self._replies.values():
                self._fail(reply, "the connection to the NATS server was lost")
            logger.warning("lost the NATS server at %s; reconnecting", url)

        async def back() -> None:
            self._connected.set()
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
                    pending_size=64 << 20,
                ),
                CONNECT_TIMEOUT_S,
            )
            await self._connection.subscribe(f"{self._inbox}.*", cb=self._answered)
        except (TimeoutError, OSError, nats.errors.Error) as error:
            self._closing = True
            await self._connection.close()
            reason = last[0] if last else str(error) or type(error).__name__
            raise TransportError(
                f"cannot connect to NATS at {url}: {reason}",
                hint="start a NATS server, set NATS_SERVER, or let `dynamo serve --infra embedded` start one",
            ) from None
        return self

    @property
    def max_payload_bytes(self) -> int:
        return self._connection.max_payload

    @property
    def connected(self) -> bool:
        return self._connected.is_set()

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
        except nats.errors.NoRespondersError:
            raise NoInstancesError(f"nobody listens on {subject}") from None
        except nats.errors.Error as error:
            raise TransportError(f"NATS request on {subject}: {error}") from None
        finally:
            timer.cancel()
            del self._replies[token]

    async def _answered(self, message: Msg) -> None:
        reply = self._replies.get(message.subject.rpartition(".")[2])
        if reply is None or reply.done():
            return
        if message.headers and message.headers.get("Status") == NO_RESPONDERS:
            reply.set_exception(nats.errors.NoRespondersError())
        else:
            reply.set_result(message.data)

    def _fail(self, reply: asyncio.Future[bytes], reason: str) -> None:
        if not reply.done():
            reply.set_exception(TransportError(reason))

    def _away(self) -> TransportError:
        return TransportError(f"the NATS server at {','.join(self._urls)} is away", hint="try again in a few seconds")

    async def publish(self, subject: str, payload: bytes) -> None:
        await self._connection.publish(subject, payload)

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
        self._closing = True
        try:
            await asyncio.wait_for(self._connection.drain(), 2.0)
        except (TimeoutError, nats.errors.Error):
            await self._connection.close()
