"""Channels in memory: those of a plain object, and of a pool of instances in a test."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable

from dynamo.errors import OverloadedError
from dynamo.sdk.broker import Limits, Subscription

log = logging.getLogger(__name__)

Handler = Callable[[bytes], None]


class InMemoryBroker:
    """Topics and work queues by name; see `dynamo.sdk.broker.Broker`."""

    def __init__(self) -> None:
        self._handlers: dict[str, list[Handler]] = {}
        self._queues: dict[str, InMemoryQueue] = {}

    async def publish(self, topic: str, payload: bytes) -> None:
        for handler in list(self._handlers.get(topic, ())):
            handler(payload)

    async def subscribe(self, topic: str, handler: Handler) -> Subscription:
        handlers = self._handlers.setdefault(topic, [])
        handlers.append(handler)
        return InMemorySubscription(handlers, handler)

    def queue(self, name: str, limits: Limits) -> InMemoryQueue:
        return self._queues.setdefault(name, InMemoryQueue(name, limits))


class InMemorySubscription:
    """A handler of one topic, until closed."""

    def __init__(self, handlers: list[Handler], handler: Handler) -> None:
        self._handlers = handlers
        self._handler = handler

    async def close(self) -> None:
        if self._handler in self._handlers:
            self._handlers.remove(self._handler)


class InMemoryQueue:
    """A work queue in memory: there are no lost consumers and no expiry."""

    def __init__(self, name: str, limits: Limits) -> None:
        self.name = name
        self.limits = limits
        self.untaken: deque[InMemoryDelivery] = deque()
        self.unfinished = 0
        self.changed = asyncio.Condition()

    async def put(self, payload: bytes) -> None:
        if self.unfinished >= self.limits.max_tasks:
            raise OverloadedError(f"the work queue {self.name} is full: {self.limits.max_tasks} tasks")
        self.unfinished += 1
        async with self.changed:
            self.untaken.append(InMemoryDelivery(self, payload))
            self.changed.notify_all()

    async def size(self) -> int:
        return self.unfinished

    async def waiting(self) -> int:
        return len(self.untaken)

    async def take(self, limit: int) -> AsyncGenerator[InMemoryDelivery, None]:
        held: set[InMemoryDelivery] = set()
        while True:
            async with self.changed:
                await self.changed.wait_for(lambda: self.untaken and len(held) < limit)
                taken = self.untaken.popleft()
                taken.begin(held)
            yield taken


class InMemoryDelivery:
    """A task in the queue, or checked out by one of its consumers."""

    def __init__(self, queue: InMemoryQueue, payload: bytes) -> None:
        self.payload = payload
        self.tries = 0
        self._queue = queue
        self._held: set[InMemoryDelivery] = set()

    def begin(self, held: set[InMemoryDelivery]) -> None:
        self._held = held
        self.tries += 1
        held.add(self)

    async def done(self) -> None:
        await self._end(again=False)

    async def drop(self, reason: str) -> None:
        log.error("dropped a task on %s: %s", self._queue.name, reason)
        await self._end(again=False)

    async def fail(self) -> None:
        if self.tries >= self._queue.limits.max_tries:
            await self.drop(f"it failed {self.tries} times")
        else:
            await self._end(again=True)

    async def _end(self, *, again: bool) -> None:
        if self not in self._held:
            return
        queue = self._queue
        async with queue.changed:
            self._held.discard(self)
            if again:
                queue.untaken.append(self)
            else:
                queue.unfinished -= 1
            queue.changed.notify_all()
