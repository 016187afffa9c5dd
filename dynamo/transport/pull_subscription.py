"""Pulling tasks from a JetStream consumer, and acknowledging, returning or dropping them.

This speaks JetStream's API (`$JS.API...`, NATS ADR-15) over `Nats`. nats-py's own `pull_subscribe` (2.16) does not fit: its
`fetch(n)` is one call with a timeout, which waits for n messages. It cannot keep a request open for each free place while
earlier tasks run, and a message that arrives behind a fetch which timed out stays in its private buffer: the server counts
it as being worked on, and it cannot be given back before it is redelivered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import msgspec

from dynamo.errors import NoInstancesError, TransportError
from dynamo.tasks import TaskSet
from dynamo.transport.nats import Nats, NatsListener, NatsMessage

log = logging.getLogger(__name__)

ACK_TIMEOUT_S = 10.0
"""How long a worker tries to acknowledge a task: a restart of the server takes less."""
ACK_ATTEMPT_TIMEOUT_S = 1.0
"""Limit of one attempt, after which the acknowledgement is sent again: a server that has just started may lose the first."""
ACK_RETRY_PAUSE_S = 0.05
PULL_EXPIRES_S = 30.0
"""The server ends a pull request after that; another one is sent."""
PULL_LOST_S = PULL_EXPIRES_S + 2.0
"""A pull request without an answer by then is lost."""
STATUS_PULL_EXPIRED = "408"
NO_MESSAGE = 10037
"""JetStream's error code for a message that is not in its stream."""
NS_PER_S = 1_000_000_000


class Delivery:
    """A task that this process works on.

    The server is kept informed of that until the task is done, given back, or no longer referenced.
    """

    def __init__(self, subscription: PullSubscription, message: NatsMessage) -> None:
        self.payload = message.data
        self.tries = _delivery_count(message.reply)
        self.subscription = subscription
        self.ack_subject = message.reply

    async def done(self) -> None:
        """Remove the task from the queue. Waits for a server that is unavailable.

        Raises TransportError when the server cannot be reached: another worker will get the task.
        """
        await self.subscription.acknowledge(self, b"+ACK")

    async def drop(self, reason: str) -> None:
        """Remove a task that cannot be done, and log that as an error. Raises TransportError like `done`."""
        log.error("task on %s dropped: %s", self.subscription.subject, reason)
        await self.subscription.acknowledge(self, b"+TERM")

    async def fail(self) -> None:
        """Give the task back, for any worker to try again now. After `max_tries` it is dropped."""
        if self.tries >= self.subscription.max_tries:
            await self.drop(f"it failed {self.tries} times")
        else:
            await self.subscription.give_back(self)


class PullSubscription:
    """Tasks of one consumer for this process, at most `limit` of them unfinished at a time.

    `ready` has those that wait to be read, `held` all that this process has. `on_refused` is called when the server
    refuses to deliver: the stream or its consumer may be missing. `refresh` must be called every second or so.
    """

    def __init__(
        self,
        nats: Nats,
        stream: str,
        consumer: str,
        subject: str,
        *,
        limit: int,
        max_tries: int,
        on_refused: Callable[[], None],
    ) -> None:
        self.subject = subject
        self.max_tries = max_tries
        self.held: WeakSet[Delivery] = WeakSet()  # weak: a task that is no longer referenced is redelivered
        self.ready: deque[Delivery] = deque()
        self.changed = asyncio.Event()
        """set when `ready` or `ended` changes"""
        self.ended = False
        self._nats = nats
        self._stream = stream
        self._pull_subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._limit = limit
        self._on_refused = on_refused
        self._inbox = nats.new_inbox()
        self._listener: NatsListener | None = None
        self._pulls: dict[str, float] = {}  # open pull requests: token -> when it counts as lost
        self._tokens = 0
        self._session = nats.session
        self._tasks = TaskSet(f"work queue {stream}")

    async def start(self) -> None:
        """Begin to receive tasks."""
        self._listener = await self._nats.listen_raw(f"{self._inbox}.*", self._on_message)
        await self.refresh()

    async def refresh(self) -> None:
        """Send a pull request for each free place. Requests that were lost are sent again."""
        if self._session != self._nats.session:  # reconnected: the server has dropped this client's requests
            self._session = self._nats.session
            self._pulls.clear()
        now = time.monotonic()
        self._pulls = {token: lost_at for token, lost_at in self._pulls.items() if lost_at >= now}
        while not self.ended and len(self.held) + len(self._pulls) < self._limit:
            self._tokens += 1
            token = str(self._tokens)
            self._pulls[token] = now + PULL_LOST_S
            request = msgspec.json.encode({"batch": 1, "expires": int(PULL_EXPIRES_S * NS_PER_S)})
            try:
                await self._nats.publish(self._pull_subject, request, reply=f"{self._inbox}.{token}")
            except TransportError:  # the server is unavailable: the next refresh tries again
                self._pulls.clear()
                return

    def _on_message(self, message: NatsMessage) -> None:
        if message.status:
            self._on_status(message)
        else:
            self._on_task(message)

    def _on_status(self, message: NatsMessage) -> None:
        self._pulls.pop(message.subject.rpartition(".")[2], None)
        if message.status == STATUS_PULL_EXPIRED:
            self._tasks.spawn(self.refresh(), name="pull")
            return
        # the consumer was deleted or the server is stopping: the queue is opened again before the next pull
        log.debug("no task from %s: status %s", self.subject, message.status)
        self._on_refused()

    def _on_task(self, message: NatsMessage) -> None:
        # a task has its own subject, not that of the request which it answers: count it for the oldest one
        self._pulls.pop(next(iter(self._pulls), ""), None)
        delivery = Delivery(self, message)
        if self.ended:
            self._tasks.spawn(self.give_back(delivery), name="give back")
            return
        self.held.add(delivery)
        if delivery.tries > self.max_tries:
            self._tasks.spawn(self._drop_lost(delivery), name="drop")
            return
        self.ready.append(delivery)
        self.changed.set()

    async def _drop_lost(self, delivery: Delivery) -> None:
        with suppress(TransportError):
            await delivery.drop(f"{self.max_tries} workers took it and were lost")

    async def acknowledge(self, delivery: Delivery, ack: bytes) -> None:
        """Send an acknowledgement until the server confirms it. No-op for a task that is not held any more.

        Raises TransportError after `ACK_TIMEOUT_S`.
        """
        if delivery not in self.held:
            return
        deadline = time.monotonic() + ACK_TIMEOUT_S
        try:
            while True:
                try:
                    await self._nats.wait_connected(deadline - time.monotonic())
                    await self._nats.request(delivery.ack_subject, ack, ACK_ATTEMPT_TIMEOUT_S)
                    return
                except (TransportError, NoInstancesError) as error:
                    if await self._is_removed(delivery):
                        return  # an acknowledgement arrived, and its confirmation was lost
                    if time.monotonic() > deadline or self._nats.closing:
                        raise TransportError(f"cannot end a task on {self.subject}: {error.message}") from None
                await asyncio.sleep(ACK_RETRY_PAUSE_S)
        finally:
            self.held.discard(delivery)
            await self.refresh()

    async def _is_removed(self, delivery: Delivery) -> bool:
        """Return True if the task is no longer in the stream: the server confirms no second acknowledgement."""
        request = msgspec.json.encode({"seq": _stream_sequence(delivery.ack_subject)})
        subject = f"$JS.API.STREAM.MSG.GET.{self._stream}"
        try:
            data = await self._nats.request(subject, request, ACK_ATTEMPT_TIMEOUT_S)
        except (TransportError, NoInstancesError):
            return False
        return error_code(msgspec.json.decode(data)) == NO_MESSAGE

    async def give_back(self, delivery: Delivery) -> None:
        """Return a task to the queue, for any worker to take now."""
        self.held.discard(delivery)
        with suppress(TransportError):  # then the server redelivers it for lack of `extend`
            await self._nats.publish(delivery.ack_subject, b"-NAK")
        await self.refresh()

    async def extend(self) -> None:
        """Report that the held tasks are being worked on, which restarts the server's redelivery timer for each."""
        for delivery in list(self.held):
            with suppress(TransportError):
                await self._nats.publish(delivery.ack_subject, b"+WPI")

    async def end(self) -> None:
        """Stop receiving, and give back the tasks that have not been read. Those that were read may still be finished."""
        self.ended = True
        self.changed.set()
        if self._listener is not None:
            listener = self._listener
            self._listener = None
            await listener.drain()
        while self.ready:
            await self.give_back(self.ready.popleft())
        await self._tasks.wait()


def _delivery_count(ack_subject: str) -> int:
    """Return how often the task was delivered.

    The subject is `$JS.ACK.<stream>.<consumer>.<deliveries>.<stream sequence>...`, or begins with
    `$JS.ACK.<domain>.<account hash>.` before the stream.
    """
    parts = ack_subject.split(".")
    return int(parts[4] if len(parts) == 9 else parts[6])


def _stream_sequence(ack_subject: str) -> int:
    parts = ack_subject.split(".")
    return int(parts[5] if len(parts) == 9 else parts[7])


def error_code(answer: dict[str, Any]) -> int:
    """Return JetStream's error code of an answer; 0 if it is no error."""
    error = answer.get("error")
    return int(error.get("err_code", error.get("code", 1))) if error else 0
