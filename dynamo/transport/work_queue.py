"""A work queue on NATS JetStream: a stream whose messages go when they are done, and one consumer that all workers share.

The stream is made at the first use. With private servers it goes with their directory; on shared ones `dynamo serve`
deletes it at its end, if no other host serves the graph. What nobody takes is dropped after `max_age_s`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import msgspec

from dynamo.errors import NoInstancesError, OverloadedError, TransportError
from dynamo.transport.nats import Listening, Message, Nats

logger = logging.getLogger(__name__)

CONSUMER = "workers"
API_TIMEOUT_S = 5.0
PUT_TIMEOUT_S = 2.0
DONE_TIMEOUT_S = 10.0
"""how long a worker tries to say that a task is done: a restart of the server takes less"""
SAY_TIMEOUT_S = 1.0
"""after which it says so again: a server that has just started may lose the first word"""
PULL_S = 30.0
"""a request for a task is given up, and made again, after that"""
TICK_S = 1.0
SIZE_AGE_S = 0.1
WAITING_AGE_S = 0.01
MAX_PULLS = 4096
REQUEST_OVER = "408"
NAME_IN_USE, FULL, NO_MESSAGE = 10058, 10077, 10037  # err_code of JetStream
_NS = 1_000_000_000


class Delivery:
    """A task that this process works on. The server hears that it does until it is done, given back, or forgotten."""

    def __init__(self, taker: _Taker, message: Message) -> None:
        self.payload = message.data
        self.tries = _deliveries(message.reply)
        self.taker, self.reply = taker, message.reply

    async def done(self) -> None:
        """Take it out of the queue, for ever. Waits for a server that is away.

        Raises TransportError when it cannot be told: another worker will get the task.
        """
        await self.taker.finish(self, b"+ACK")

    async def drop(self, reason: str) -> None:
        """The same, with a line in the log, for a task that cannot be done."""
        logger.error("task on %s dropped: %s", self.taker.queue.subject, reason)
        await self.taker.finish(self, b"+TERM")

    async def fail(self) -> None:
        """Give it back, for any worker to try again now; after `max_tries` it is dropped."""
        if self.tries >= self.taker.queue.max_tries:
            await self.drop(f"it failed {self.tries} times")
        else:
            await self.taker.give_back(self)


class _Taker:
    """One `take()`: asks for as many tasks as may be worked on at a time and are not."""

    def __init__(self, queue: Queue, nats: Nats, limit: int) -> None:
        self.queue, self.nats, self.limit = queue, nats, limit
        self.held: WeakSet[Delivery] = WeakSet()  # weak: nobody says any more that a forgotten task is worked on
        self.ready: deque[Delivery] = deque()
        self.changed = asyncio.Event()
        self.ended = False
        self._inbox = nats.new_inbox()
        self._listening: Listening | None = None
        self._pulls: dict[str, float] = {}  # token -> when it is given up
        self._tokens = 0
        self._session = nats.session
        self._late: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._listening = await self.nats.receive(f"{self._inbox}.*", self._arrived)
        await self.pull()

    async def pull(self) -> None:
        """Ask for a task for each free place, again where the request was lost."""
        if self._session != self.nats.session:  # it is a new server, or has forgotten this client's requests
            self._session = self.nats.session
            self._pulls.clear()
        now = time.monotonic()
        for token in [token for token, until in self._pulls.items() if until < now]:
            del self._pulls[token]
        while not self.ended and len(self.held) + len(self._pulls) < self.limit:
            self._tokens += 1
            token = str(self._tokens)
            self._pulls[token] = now + PULL_S + 2 * TICK_S
            subject = f"$JS.API.CONSUMER.MSG.NEXT.{self.queue.stream}.{CONSUMER}"
            request = msgspec.json.encode({"batch": 1, "expires": int(PULL_S * _NS)})
            try:
                await self.nats.publish(subject, request, reply=f"{self._inbox}.{token}")
            except TransportError:  # it is away: the next tick tries again
                self._pulls.clear()
                return

    def _arrived(self, message: Message) -> None:
        # a task comes with the subject under which it was put: any request may be taken for the one that it answers
        self._pulls.pop(message.subject.rpartition(".")[2] if message.status else next(iter(self._pulls), ""), None)
        if message.status == REQUEST_OVER:
            self._spawn(self.pull())
            return
        if message.status:  # the consumer has gone, or the server is about to: the next tick makes and asks again
            logger.debug("no task from %s: status %s", self.queue.subject, message.status)
            self.queue.is_open = False
            return
        taken = Delivery(self, message)
        if self.ended:
            self._spawn(self.give_back(taken))
            return
        self.held.add(taken)
        if taken.tries > self.queue.max_tries:
            self._spawn(self._drop_lost(taken))
            return
        self.ready.append(taken)
        self.changed.set()

    async def _drop_lost(self, taken: Delivery) -> None:
        with suppress(TransportError):
            await taken.drop(f"{self.queue.max_tries} workers took it and were lost")

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._late.add(task)
        task.add_done_callback(self._late.discard)

    async def finish(self, taken: Delivery, word: bytes) -> None:
        if taken not in self.held:
            return
        deadline = time.monotonic() + DONE_TIMEOUT_S
        try:
            while True:
                try:
                    await self.nats.wait_connected(deadline - time.monotonic())
                    await self.nats.request(taken.reply, word, SAY_TIMEOUT_S)
                    return
                except (TransportError, NoInstancesError) as error:
                    if await self._is_gone(taken):
                        return  # the first word was heard, and its answer was lost
                    if time.monotonic() > deadline or self.nats.closing:
                        raise TransportError(f"cannot end a task on {self.queue.subject}: {error.message}") from None
                await asyncio.sleep(0.05)
        finally:
            self.held.discard(taken)
            await self.pull()

    async def _is_gone(self, taken: Delivery) -> bool:
        """Whether the stream has the task no more. A second word about it would not be answered."""
        request = msgspec.json.encode({"seq": _place(taken.reply)})
        try:
            data = await self.nats.request(f"$JS.API.STREAM.MSG.GET.{self.queue.stream}", request, SAY_TIMEOUT_S)
        except (TransportError, NoInstancesError):
            return False
        return _error_code(msgspec.json.decode(data)) == NO_MESSAGE

    async def give_back(self, taken: Delivery) -> None:
        self.held.discard(taken)
        with suppress(TransportError):  # then the server notices by itself that nobody works on it
            await self.nats.publish(taken.reply, b"-NAK")
        await self.pull()

    async def keep(self) -> None:
        for taken in list(self.held):
            with suppress(TransportError):
                await self.nats.publish(taken.reply, b"+WPI")

    async def end(self) -> None:
        """Take no more, and give back what nobody has begun with."""
        self.ended = True
        self.changed.set()
        if self._listening is not None:
            listening, self._listening = self._listening, None
            await listening.drain()
        while self.ready:
            await self.give_back(self.ready.popleft())
        await asyncio.gather(*self._late)


class Queue:
    """Tasks, each for one of many workers. `connect` gives the connection, which reconnects by itself."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[Nats]],
        stream: str,
        subject: str,
        *,
        max_tasks: int,
        max_age_s: float,
        max_tries: int,
        lost_after_s: float,
    ) -> None:
        self._connect = connect
        self.stream, self.subject, self.max_tries = stream, subject, max_tries
        self._max_tasks, self._max_age_s, self._lost_after_s = max_tasks, max_age_s, lost_after_s
        self.is_open = self._was_open = False
        self._opening, self._measuring = asyncio.Lock(), asyncio.Lock()
        self._size, self._measured = 0, float("-inf")
        self._waiting, self._waiting_measured = 0, float("-inf")
        self._takers: set[_Taker] = set()
        self._ticking: asyncio.Task[None] | None = None
        self._stopped = False

    async def _opened(self) -> Nats:
        """The connection, when stream and consumer are there."""
        nats = await self._connect()
        async with self._opening:
            if not self.is_open:
                await self._create(nats)
                self.is_open = self._was_open = True
        return nats

    async def _create(self, nats: Nats) -> None:
        stream = {
            "name": self.stream,
            "subjects": [self.subject],
            "retention": "workqueue",
            "storage": "file",
            "discard": "new",
            "max_msgs": self._max_tasks,
            "max_age": int(self._max_age_s * _NS),
        }
        consumer = {
            "durable_name": CONSUMER,
            "ack_policy": "explicit",
            "ack_wait": int(self._lost_after_s * _NS),
            "max_deliver": -1,  # counted here: the server would leave such tasks in the stream
            "max_ack_pending": self._max_tasks,
            "max_waiting": MAX_PULLS,
        }
        answer = await self._ask(nats, f"STREAM.CREATE.{self.stream}", stream)
        if _error_code(answer) == NAME_IN_USE:  # with other limits
            answer = await self._ask(nats, f"STREAM.UPDATE.{self.stream}", stream)
        if self._was_open and answer.get("did_create"):
            logger.warning("the stream %s had gone, with its tasks; there is a new one", self.stream)
        if not _error_code(answer):
            request = {"stream_name": self.stream, "config": consumer}
            answer = await self._ask(nats, f"CONSUMER.DURABLE.CREATE.{self.stream}.{CONSUMER}", request)
        if _error_code(answer):
            raise TransportError(
                f"cannot open the work queue {self.stream}: {answer['error'].get('description')}",
                hint="give NATS a JetStream account with room for it",
            )

    async def _ask(self, nats: Nats, call: str, request: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            data = await nats.request(
                f"$JS.API.{call}", msgspec.json.encode(request) if request else b"", API_TIMEOUT_S
            )
        except NoInstancesError:
            raise TransportError(
                f"cannot open the work queue {self.stream}: the NATS server has no JetStream",
                hint="start it as `nats-server -js`, or let `dynamo serve --infra embedded` start one",
            ) from None
        answer: dict[str, Any] = msgspec.json.decode(data)
        return answer

    async def put(self, payload: bytes) -> None:
        """Returns when the server has stored it. Raises OverloadedError when the queue is full, else TransportError."""
        for last in (False, True):
            nats = await self._opened()
            nats.check_size(self.subject, len(payload))
            try:
                answer = msgspec.json.decode(await nats.request(self.subject, payload, PUT_TIMEOUT_S))
            except NoInstancesError:  # the stream has gone, with the files of its server
                self.is_open = False
                if last:
                    raise TransportError(f"cannot put a task on {self.subject}: its stream has gone") from None
                continue
            if _error_code(answer):
                reason = str(answer["error"].get("description"))
                if _error_code(answer) == FULL and "maximum" in reason:
                    raise OverloadedError(f"the work queue {self.subject} is full: {self._max_tasks} tasks")
                raise TransportError(f"cannot put a task on {self.subject}: {reason}")
            self._size += 1  # until it is measured again
            return

    async def size(self) -> int:
        """Tasks that are not done: those that wait and those that are worked on, as of `SIZE_AGE_S` ago at most."""
        async with self._measuring:
            if time.monotonic() - self._measured > SIZE_AGE_S:
                nats = await self._opened()
                answer = await self._ask(nats, f"STREAM.INFO.{self.stream}")
                if _error_code(answer):
                    self.is_open = False
                    raise TransportError(f"no size of {self.subject}: {answer['error'].get('description')}")
                self._size, self._measured = answer["state"]["messages"], time.monotonic()
            return self._size

    async def waiting(self) -> int:
        """Tasks that nobody has taken, as of `WAITING_AGE_S` ago at most."""
        async with self._measuring:
            if time.monotonic() - self._waiting_measured > WAITING_AGE_S:
                nats = await self._opened()
                answer = await self._ask(nats, f"CONSUMER.INFO.{self.stream}.{CONSUMER}")
                if _error_code(answer):
                    self.is_open = False
                    raise TransportError(f"no length of {self.subject}: {answer['error'].get('description')}")
                self._waiting, self._waiting_measured = answer["num_pending"], time.monotonic()
            return self._waiting

    async def take(self, limit: int) -> AsyncGenerator[Delivery, None]:
        """Tasks, at most `limit` of them unfinished at a time, until `stop`."""
        if self._stopped:
            return
        taker = _Taker(self, await self._opened(), limit)
        self._takers.add(taker)
        if self._ticking is None:
            self._ticking = asyncio.get_running_loop().create_task(self._tick(), name=f"work queue {self.stream}")
        try:
            await taker.start()
            while not taker.ended:
                if taker.ready:
                    yield taker.ready.popleft()
                else:
                    taker.changed.clear()
                    await taker.changed.wait()
        finally:
            await taker.end()

    async def _tick(self) -> None:
        """Say of all tasks that are worked on that they are; repair what a restart of the server has lost."""
        beat = 0.0
        while True:
            await asyncio.sleep(min(TICK_S, self._lost_after_s / 4))
            due = time.monotonic() - beat >= self._lost_after_s / 4
            beat = time.monotonic() if due else beat
            for taker in list(self._takers):
                if taker.ended and not taker.held:
                    self._takers.discard(taker)
                if due:
                    await taker.keep()
                with suppress(TransportError):
                    await self._opened()
                    await taker.pull()

    async def stop(self) -> None:
        """End every `take()`; tasks that are worked on may still be finished."""
        self._stopped = True
        for taker in list(self._takers):
            await taker.end()

    async def close(self) -> None:
        """Give back what is not finished."""
        await self.stop()
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.gather(self._ticking, return_exceptions=True)
        for taker in self._takers:
            for taken in list(taker.held):
                await taker.give_back(taken)


async def delete(nats: Nats, stream: str) -> None:
    """Delete a queue with its tasks; nothing happens if there is none. Raises TransportError when NATS is away."""
    with suppress(NoInstancesError):  # no JetStream, so no queue
        await nats.request(f"$JS.API.STREAM.DELETE.{stream}", b"", API_TIMEOUT_S)


def _deliveries(reply: str) -> int:
    """Read from a message's subject for answers: `$JS.ACK[.domain.account].stream.consumer.deliveries.place...`"""
    parts = reply.split(".")
    return int(parts[4] if len(parts) == 9 else parts[6])


def _place(reply: str) -> int:
    """The message's number in its stream."""
    parts = reply.split(".")
    return int(parts[5] if len(parts) == 9 else parts[7])


def _error_code(answer: dict[str, Any]) -> int:
    error = answer.get("error")
    return int(error.get("err_code", error.get("code", 1))) if error else 0
