"""A work queue on NATS JetStream: a stream that removes messages once they are done, with one consumer for all workers.

The stream is created at the first use. With private servers it is deleted with their directory; on shared ones
`dynamo serve` deletes it when it ends, if no other host serves the graph. Tasks are dropped after `max_age_s`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import msgspec

from dynamo.errors import NoInstancesError, OverloadedError, TransportError
from dynamo.tasks import TaskSet
from dynamo.transport.nats import Nats
from dynamo.transport.pull_subscription import NS_PER_S, Delivery, PullSubscription, error_code

log = logging.getLogger(__name__)

API_TIMEOUT_S = 5.0
PUT_TIMEOUT_S = 2.0
REFRESH_INTERVAL_S = 1.0
SIZE_AGE_S = 0.1
WAITING_AGE_S = 0.01
MAX_PULLS = 4096
NAME_IN_USE, FULL = 10058, 10077
"""Error codes of JetStream."""


class JetStreamQueue:
    """Tasks as bytes, each for one of many workers. `connect` returns the connection, which reconnects by itself."""

    consumer = "workers"

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
        self.stream = stream
        self.subject = subject
        self.max_tries = max_tries
        self._max_tasks = max_tasks
        self._max_age_s = max_age_s
        self._lost_after_s = lost_after_s
        self._is_open = False
        self._was_open = False
        self._opening = asyncio.Lock()
        self._measuring = asyncio.Lock()
        self._size = 0
        self._size_measured_at = float("-inf")
        self._waiting = 0
        self._waiting_measured_at = float("-inf")
        self._subscriptions: set[PullSubscription] = set()
        self._tasks = TaskSet(f"work queue {stream}")
        self._stopped = False

    # -- opening

    async def _open(self) -> Nats:
        """Return the connection, once the stream and its consumer exist."""
        nats = await self._connect()
        async with self._opening:
            if not self._is_open:
                await self._create(nats)
                self._is_open = True
                self._was_open = True
        return nats

    def _reopen(self) -> None:
        """Check at the next use that the stream and its consumer exist."""
        self._is_open = False

    async def _create(self, nats: Nats) -> None:
        stream = {
            "name": self.stream,
            "subjects": [self.subject],
            "retention": "workqueue",
            "storage": "file",
            "discard": "new",
            "max_msgs": self._max_tasks,
            "max_age": int(self._max_age_s * NS_PER_S),
        }
        consumer = {
            "durable_name": self.consumer,
            "ack_policy": "explicit",
            "ack_wait": int(self._lost_after_s * NS_PER_S),
            "max_deliver": -1,  # PullSubscription counts: the server would keep such tasks in the stream
            "max_ack_pending": self._max_tasks,
            "max_waiting": MAX_PULLS,
        }
        answer = await self._request(nats, f"STREAM.CREATE.{self.stream}", stream)
        if error_code(answer) == NAME_IN_USE:  # with other limits
            answer = await self._request(nats, f"STREAM.UPDATE.{self.stream}", stream)
        if self._was_open and answer.get("did_create"):
            log.warning("the stream %s was lost with its tasks; created a new one", self.stream)
        if not error_code(answer):
            request = {"stream_name": self.stream, "config": consumer}
            answer = await self._request(nats, f"CONSUMER.DURABLE.CREATE.{self.stream}.{self.consumer}", request)
        if error_code(answer):
            raise self._not_opened(answer)

    def _not_opened(self, answer: dict[str, Any]) -> TransportError:
        return TransportError(
            f"cannot open the work queue {self.stream}: {answer['error'].get('description')}",
            hint="give NATS a JetStream account with room for it",
        )

    async def _request(self, nats: Nats, call: str, request: dict[str, Any] | None = None) -> dict[str, Any]:
        payload = msgspec.json.encode(request) if request else b""
        try:
            data = await nats.request(f"$JS.API.{call}", payload, API_TIMEOUT_S)
        except NoInstancesError:
            raise TransportError(
                f"cannot open the work queue {self.stream}: the NATS server has no JetStream",
                hint="start it as `nats-server -js`, or let `dynamo serve --infra embedded` start one",
            ) from None
        answer: dict[str, Any] = msgspec.json.decode(data)
        return answer

    # -- the producer's side

    async def put(self, payload: bytes) -> None:
        """Add a task; return when the server has stored it.

        Raises OverloadedError when the queue is full, else TransportError.
        """
        for is_last in (False, True):
            nats = await self._open()
            nats.check_size(self.subject, len(payload))
            try:
                answer = msgspec.json.decode(await nats.request(self.subject, payload, PUT_TIMEOUT_S))
            except NoInstancesError:  # the stream was deleted, or its server's files were
                self._reopen()
                if is_last:
                    raise TransportError(f"cannot put a task on {self.subject}: its stream was deleted") from None
                continue
            if error_code(answer):
                reason = str(answer["error"].get("description"))
                if error_code(answer) == FULL and "maximum" in reason:
                    raise OverloadedError(f"the work queue {self.subject} is full: {self._max_tasks} tasks")
                raise TransportError(f"cannot put a task on {self.subject}: {reason}")
            self._size += 1  # until it is measured again
            return

    async def size(self) -> int:
        """Return the number of unfinished tasks, waiting or being worked on, as of `SIZE_AGE_S` ago at most."""
        async with self._measuring:
            if time.monotonic() - self._size_measured_at > SIZE_AGE_S:
                answer = await self._info(f"STREAM.INFO.{self.stream}")
                self._size = answer["state"]["messages"]
                self._size_measured_at = time.monotonic()
            return self._size

    async def waiting(self) -> int:
        """Return the number of tasks that no worker has taken, as of `WAITING_AGE_S` ago at most."""
        async with self._measuring:
            if time.monotonic() - self._waiting_measured_at > WAITING_AGE_S:
                answer = await self._info(f"CONSUMER.INFO.{self.stream}.{self.consumer}")
                self._waiting = answer["num_pending"]
                self._waiting_measured_at = time.monotonic()
            return self._waiting

    async def _info(self, call: str) -> dict[str, Any]:
        answer = await self._request(await self._open(), call)
        if error_code(answer):
            self._reopen()
            raise TransportError(f"cannot read the length of {self.subject}: {answer['error'].get('description')}")
        return answer

    # -- the worker's side

    async def take(self, limit: int) -> AsyncGenerator[Delivery, None]:
        """Yield tasks, at most `limit` of them unfinished at a time, until `stop`."""
        if self._stopped:
            return
        subscription = PullSubscription(
            await self._open(),
            self.stream,
            self.consumer,
            self.subject,
            limit=limit,
            max_tries=self.max_tries,
            on_refused=self._reopen,
        )
        self._subscriptions.add(subscription)
        if not self._tasks:
            self._tasks.keep_running(self._maintain, name="extend and pull")
        try:
            await subscription.start()
            while not subscription.ended:
                if subscription.ready:
                    yield subscription.ready.popleft()
                else:
                    subscription.changed.clear()
                    await subscription.changed.wait()
        finally:
            await subscription.end()

    async def _maintain(self) -> None:
        """Extend the tasks that are worked on, and send again what a restart of the server has lost, until cancelled."""
        extend_interval_s = self._lost_after_s / 4
        extended_at = 0.0
        while True:
            await asyncio.sleep(min(REFRESH_INTERVAL_S, extend_interval_s))
            due = time.monotonic() - extended_at >= extend_interval_s
            if due:
                extended_at = time.monotonic()
            for subscription in list(self._subscriptions):
                if subscription.ended and not subscription.held:
                    self._subscriptions.discard(subscription)
                if due:
                    await subscription.extend()
                with suppress(TransportError):
                    await self._open()
                    await subscription.refresh()

    async def stop(self) -> None:
        """End every `take()`. Tasks that are worked on may still be finished."""
        self._stopped = True
        for subscription in list(self._subscriptions):
            await subscription.end()

    async def close(self) -> None:
        """End every `take()` and give back the unfinished tasks."""
        await self.stop()
        await self._tasks.aclose()
        for subscription in self._subscriptions:
            for delivery in list(subscription.held):
                await subscription.give_back(delivery)


async def delete(nats: Nats, stream: str) -> None:
    """Delete a queue with its tasks, if it exists. Raises TransportError when NATS is unavailable."""
    with suppress(NoInstancesError):  # no JetStream, so no queue
        await nats.request(f"$JS.API.STREAM.DELETE.{stream}", b"", API_TIMEOUT_S)
