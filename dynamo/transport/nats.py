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
CONNECT_TIMEOUT_S = 5.0
RECONNECT_WAIT_S = 0.1
HOLD_S = 0.8  # how long a request waits for a lost server before the caller hears of it

Handler = Callable[[bytes, Callable[[bytes], Awaitable[None]]], Awaitable[None]]


class Nats:
    """One connection. It reconnects for ever by itself; requests made meanwhile wait up to `HOLD_S`, then fail."""

    def __init__(self, connection: NatsConnection, urls: list[str]) -> None:
        self._connection, self._urls = connection, urls
        self._connected = asyncio.Event()
        self._connected.set()
        self._closing = False

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
                    connect_timeout=2,
                    pending_size=64 << 20,
                ),
                CONNECT_TIMEOUT_S,
            )
        except (TimeoutError, OSError, nats.errors.Error) as error:
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

    async def request(self, subject: str, payload: bytes, timeout_s: float) -> bytes:
        """The answer to one request.

        Raises NoInstancesError when nobody listens on `subject`, TransportError when the server is away or no answer
        came in time.
        """
        if not self._connected.is_set():
            try:
                await asyncio.wait_for(self._connected.wait(), min(HOLD_S, timeout_s))
            except TimeoutError:
                raise TransportError(
                    f"the NATS server at {','.join(self._urls)} is away", hint="try again in a few seconds"
                ) from None
        try:
            return (await self._connection.request(subject, payload, timeout=timeout_s)).data
        except nats.errors.NoRespondersError:
            raise NoInstancesError(f"nobody listens on {subject}") from None
        except nats.errors.TimeoutError:
            raise TransportError(f"no answer on {subject} within {timeout_s:.1f} s") from None
        except nats.errors.Error as error:
            raise TransportError(f"NATS request on {subject}: {error}") from None

    async def publish(self, subject: str, payload: bytes) -> None:
        await self._connection.publish(subject, payload)

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Subscription:
        """Call `handler(data, respond)` for each message, one after the other: it must hand long work to a task."""

        async def deliver(message: Msg) -> None:
            try:
                await handler(message.data, message.respond)
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
