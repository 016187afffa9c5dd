"""`Topic`: messages from a service to its subscribers. `WorkQueue`: tasks, each for one worker of a service.

    class VllmWorker(Service):
        kv_events = Topic(KvEvents)                  # self.kv_events.publish(message)

    class Router(Service):
        worker = depends(VllmWorker)                 # self.worker.kv_events.subscribe(handler)

    class PrefillWorker(Service):
        tasks = WorkQueue(PrefillTask)               # async for job in self.tasks.take(limit=4): async with job: ...

    class Decoder(Service):
        prefill = depends(PrefillWorker)             # self.prefill.tasks.put(task)

In a served process they go over NATS; those of a plain object, as in a test, stay in memory.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Generic, TypeVar, overload

from dynamo import codec
from dynamo.errors import GraphError, RequestError
from dynamo.sdk.broker import Broker, Delivery, Limits, Subscription, Tasks
from dynamo.sdk.endpoint import NAME
from dynamo.sdk.in_memory_broker import InMemoryBroker

log = logging.getLogger(__name__)

M = TypeVar("M")

_BROKER = "_dynamo_broker"


class ChannelSpec(ABC):
    """Declaration of a channel in a class body. Its name is the attribute's unless another is given."""

    def __init__(self, name: str | None) -> None:
        if name is not None and (not NAME.fullmatch(name) or "/" in name):
            raise GraphError(f"{type(self).__name__} name {name!r}: letters, digits, '_' and '-' only")
        self.name = name or ""
        self.attribute = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.attribute = name
        self.name = self.name or name

    @abstractmethod
    def open(self, broker: Broker) -> Any:
        """Return the channel on `broker`: an `OpenTopic` or an `OpenQueue`."""

    def opened(self, instance: object) -> Any:
        """Return the channel of an object, opened at the first use."""
        values = instance.__dict__
        slot = f"_dynamo_channel_{self.attribute}"
        if slot not in values:
            broker = values.get(_BROKER)
            if broker is None:
                broker = values[_BROKER] = InMemoryBroker()
            values[slot] = self.open(broker)
        return values[slot]


class OpenTopic(Generic[M]):
    """A topic of one service, to publish on and to subscribe to."""

    __slots__ = ("_broker", "_decode", "_name")

    def __init__(self, name: str, broker: Broker, decode: codec.Decode) -> None:
        self._name = name
        self._broker = broker
        self._decode = decode

    async def publish(self, message: M) -> None:
        """Send a message to the current subscribers.

        It is not stored for later ones. Raises TransportError when NATS is unreachable or the message exceeds its limit.
        """
        await self._broker.publish(self._name, codec.encode(message))

    async def subscribe(self, handler: Callable[[M], None]) -> Subscription:
        """Call `handler` on the event loop for each message from any instance, from the return of this call on.

        Exceptions from `handler` are logged. When it falls some ten thousand messages behind, messages are dropped.
        """

        def deliver(payload: bytes) -> None:
            try:
                handler(self._decode(payload))
            except RequestError as error:
                log.error("dropped a message on topic %s: %s", self._name, error)
            except Exception:
                log.exception("subscriber of topic %s failed", self._name)

        return await self._broker.subscribe(self._name, deliver)

    def __repr__(self) -> str:
        return f"<topic {self._name}>"


class Topic(ChannelSpec, Generic[M]):
    """Declare a topic of this service with the type of its messages: a msgspec Struct, or any request type.

    Its NATS subject is `namespace.<namespace>.component.<service>.<name>`. All instances publish on it; a subscriber
    receives the messages of all of them.
    """

    def __init__(self, message: type[M], /, *, name: str | None = None) -> None:
        super().__init__(name)
        self.message = message

    @overload
    def __get__(self, instance: None, owner: Any = None) -> Topic[M]: ...
    @overload
    def __get__(self, instance: object, owner: Any = None) -> OpenTopic[M]: ...
    def __get__(self, instance: object | None, owner: Any = None) -> Topic[M] | OpenTopic[M]:
        if instance is None:
            return self
        opened: OpenTopic[M] = self.opened(instance)
        return opened

    def open(self, broker: Broker) -> OpenTopic[M]:
        return OpenTopic(self.name, broker, codec.decoder(self.message))

    def __repr__(self) -> str:
        return f"Topic({getattr(self.message, '__name__', self.message)})"


class Job(Generic[M]):
    """A task that this process has checked out, until `done`, `fail` or `drop`; no other worker gets it meanwhile.

    As an async context manager it calls `done` on success and `fail` when an exception leaves the block. A job whose
    process hangs or dies, or that is no longer referenced, goes to another worker after `lost_after_s`.
    """

    __slots__ = ("_delivery", "task")

    def __init__(self, task: M, delivery: Delivery) -> None:
        self.task = task
        self._delivery = delivery

    @property
    def tries(self) -> int:
        """Number of workers that have received the task, this one included."""
        return self._delivery.tries

    async def done(self) -> None:
        """Remove the task from the queue, waiting some seconds for NATS if it is unreachable.

        Raises TransportError when it stays unreachable: another worker will get the task.
        """
        await self._delivery.done()

    async def fail(self) -> None:
        """Return the task to the queue for any worker to retry now; after `max_tries` it is dropped, which is logged."""
        await self._delivery.fail()

    async def drop(self, reason: str) -> None:
        """Remove a task that cannot be processed, and log the reason."""
        await self._delivery.drop(reason)

    async def __aenter__(self) -> Job[M]:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await (self.done() if kind is None else self.fail())

    def __repr__(self) -> str:
        return f"<job {self.task!r}, try {self.tries}>"


class OpenQueue(Generic[M]):
    """The work queue of one service: put tasks in, take them out."""

    __slots__ = ("_decode", "_tasks")

    def __init__(self, tasks: Tasks, decode: codec.Decode) -> None:
        self._tasks = tasks
        self._decode = decode

    async def put(self, task: M) -> None:
        """Store a task; return when it is stored.

        Raises OverloadedError when the queue is full, TransportError when storing was not confirmed: the task may still
        have been stored if the server died at that moment.
        """
        await self._tasks.put(codec.encode(task))

    async def size(self) -> int:
        """Return the number of unfinished tasks, waiting and checked out.

        It is at most 100 ms old; tasks that this process has put since then are included.
        """
        return await self._tasks.size()

    async def waiting(self) -> int:
        """Return the number of tasks that no worker has taken, at most 10 ms old; later puts are not included."""
        return await self._tasks.waiting()

    async def take(self, limit: int = 1) -> AsyncGenerator[Job[M], None]:
        """Yield tasks as they arrive, each for this worker alone, with at most `limit` unfinished at a time.

        Ends when the process stops; it may finish what it has begun, in a shutdown hook for example. Raises
        TransportError when NATS is unreachable at the beginning or has no JetStream; later outages are waited out.
        """
        if limit < 1:
            raise ValueError(f"take: limit: expected at least 1, found {limit}")
        async with aclosing(self._tasks.take(limit)) as tasks:
            async for delivery in tasks:
                try:
                    task = self._decode(delivery.payload)
                except RequestError as error:
                    await delivery.drop(error.message)
                    continue
                job: Job[M] = Job(task, delivery)
                del delivery, task  # the task is checked out for as long as its job is referenced
                yield job
                del job


class WorkQueue(ChannelSpec, Generic[M]):
    """Declare a queue of tasks for the workers of this service, with their type: a msgspec Struct, or any request type.

    The queue is a JetStream stream: tasks survive restarts of workers and of NATS. Delivery is at least once: a task
    goes to another worker when the one that has it is silent for `lost_after_s`, at most `max_tries` times; then, or
    after `max_age_s`, it is dropped. `put` refuses more than `max_tasks` unfinished tasks.
    """

    def __init__(
        self,
        task: type[M],
        /,
        *,
        name: str | None = None,
        max_tasks: int = 1024,
        max_age_s: float = 600.0,
        max_tries: int = 3,
        lost_after_s: float = 5.0,
    ) -> None:
        super().__init__(name)
        self.task = task
        self.limits = Limits(max_tasks, max_age_s, max_tries, lost_after_s)
        for field, value in self.limits._asdict().items():
            if value <= 0:
                raise GraphError(f"WorkQueue {field}: expected more than 0, found {value}")

    @overload
    def __get__(self, instance: None, owner: Any = None) -> WorkQueue[M]: ...
    @overload
    def __get__(self, instance: object, owner: Any = None) -> OpenQueue[M]: ...
    def __get__(self, instance: object | None, owner: Any = None) -> WorkQueue[M] | OpenQueue[M]:
        if instance is None:
            return self
        opened: OpenQueue[M] = self.opened(instance)
        return opened

    def open(self, broker: Broker) -> OpenQueue[M]:
        return OpenQueue(broker.queue(self.name, self.limits), codec.decoder(self.task))

    def __repr__(self) -> str:
        return f"WorkQueue({getattr(self.task, '__name__', self.task)})"


def attach(instance: object, broker: Broker) -> None:
    """Attach the channels of one object to `broker`, before any of them is used."""
    instance.__dict__[_BROKER] = broker


def channels(cls: type[Any]) -> dict[str, ChannelSpec]:
    """Return attribute -> channel of a service class, inherited ones included. Raises GraphError on a duplicate name."""
    found: dict[str, ChannelSpec] = {}
    for base in reversed(cls.__mro__):
        for attribute, value in vars(base).items():
            if isinstance(value, ChannelSpec):
                found[attribute] = value
            else:
                found.pop(attribute, None)
    named: dict[str, str] = {}
    for attribute, channel in found.items():
        other = named.setdefault(channel.name, attribute)
        if other != attribute:
            raise GraphError(f"{cls.__name__}.{attribute}: {other} already has the name {channel.name!r}")
    return found
