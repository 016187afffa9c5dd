"""`Topic`: messages from a service to whoever listens. `WorkQueue`: tasks, each for one worker of a service.

    class VllmWorker(Service):
        kv_events = Topic(KvEvents)                  # self.kv_events.publish(message)

    class Router(Service):
        worker = depends(VllmWorker)                 # self.worker.kv_events.subscribe(handler)

    class PrefillWorker(Service):
        tasks = WorkQueue(PrefillTask)               # async for job in self.tasks.take(limit=4): async with job: ...

    class Decoder(Service):
        prefill = depends(PrefillWorker)             # self.prefill.tasks.put(task)

In a process of a graph they go over NATS; those of a plain object, as in a test, stay in memory.
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

logger = logging.getLogger(__name__)

M = TypeVar("M")

_BROKER = "_dynamo_broker"


class ChannelSpec(ABC):
    """What a class body says of a channel: its name, which is the attribute's unless another is given."""

    def __init__(self, name: str | None) -> None:
        if name is not None and (not NAME.fullmatch(name) or "/" in name):
            raise GraphError(f"{type(self).__name__} name {name!r}: letters, digits, '_' and '-' only")
        self.name = name or ""
        self.attribute = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.attribute, self.name = name, self.name or name

    @abstractmethod
    def open(self, broker: Broker) -> Any:
        """What stands behind it: an `OpenTopic` or an `OpenQueue`."""

    def opened(self, instance: object) -> Any:
        """The one of an object, made at the first use."""
        values, slot = instance.__dict__, f"_dynamo_channel_{self.attribute}"
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
        self._name, self._broker, self._decode = name, broker, decode

    async def publish(self, message: M) -> None:
        """Send to all who listen now. Raises TransportError when NATS is away or takes no message of this size.

        Nothing is kept for later: the caller knows whether the message still matters then.
        """
        await self._broker.publish(self._name, codec.encode(message))

    async def subscribe(self, handler: Callable[[M], None]) -> Subscription:
        """Call `handler` on the event loop for each message from any instance, from the return of this on.

        What it raises is logged. Messages that it cannot keep up with, some ten thousand of them, are dropped.
        """

        def deliver(payload: bytes) -> None:
            try:
                handler(self._decode(payload))
            except RequestError as error:
                logger.error("message on topic %s dropped: %s", self._name, error)
            except Exception:
                logger.exception("a subscriber of topic %s failed", self._name)

        return await self._broker.subscribe(self._name, deliver)

    def __repr__(self) -> str:
        return f"<topic {self._name}>"


class Topic(ChannelSpec, Generic[M]):
    """Declare a topic of this service with the type of its messages: a msgspec Struct, or what an endpoint may take.

    Its subject in NATS is `namespace.<namespace>.component.<service>.<name>`. Each instance publishes on it; a
    subscriber hears all of them.
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
    """A task that this process works on, until `done`, `fail` or `drop`; other workers do not get it meanwhile.

    As an async context it is done at the end, and given back if an exception leaves it. One whose process hangs or dies,
    or that nothing refers to any more, goes to another worker `lost_after_s` later.
    """

    __slots__ = ("_taken", "task")

    def __init__(self, task: M, taken: Delivery) -> None:
        self.task, self._taken = task, taken

    @property
    def tries(self) -> int:
        """Counts the workers that got the task: 1 for the first."""
        return self._taken.tries

    async def done(self) -> None:
        """Take the task out of the queue, for ever. Waits some seconds for NATS if it is away.

        Raises TransportError when it stays away: another worker will get the task.
        """
        await self._taken.done()

    async def fail(self) -> None:
        """Give the task back, for any worker to try again now. After `max_tries` it is dropped, with a line in the log."""
        await self._taken.fail()

    async def drop(self, reason: str) -> None:
        """As `done`, with a line in the log, for a task that cannot be done."""
        await self._taken.drop(reason)

    async def __aenter__(self) -> Job[M]:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await (self.done() if kind is None else self.fail())

    def __repr__(self) -> str:
        return f"<job {self.task!r}, try {self.tries}>"


class OpenQueue(Generic[M]):
    """The work queue of one service, to put tasks into and to take them out."""

    __slots__ = ("_decode", "_tasks")

    def __init__(self, tasks: Tasks, decode: codec.Decode) -> None:
        self._tasks, self._decode = tasks, decode

    async def put(self, task: M) -> None:
        """Returns when the task is stored.

        Raises OverloadedError when the queue is full, TransportError when it is not known to be stored: it may be, if the
        server died in that moment.
        """
        await self._tasks.put(codec.encode(task))

    async def size(self) -> int:
        """Tasks that are not done: those that wait and those that are worked on.

        The number is at most 100 ms old; tasks that this process put since then are in it.
        """
        return await self._tasks.size()

    async def waiting(self) -> int:
        """Tasks that no worker has taken, as of 10 ms ago at most; what was put since then is not in it."""
        return await self._tasks.waiting()

    async def take(self, limit: int = 1) -> AsyncGenerator[Job[M], None]:
        """Tasks as they come, each for this worker alone; at most `limit` of them are unfinished at a time.

        Ends when the process stops: it may finish what it has begun, in a shutdown hook, say. Raises TransportError when
        NATS is away at the beginning, or has no JetStream; later it goes on by itself when NATS is back.
        """
        if limit < 1:
            raise ValueError(f"take: limit: expected at least 1, found {limit}")
        async with aclosing(self._tasks.take(limit)) as tasks:
            async for taken in tasks:
                try:
                    task = self._decode(taken.payload)
                except RequestError as error:
                    await taken.drop(error.message)
                    continue
                job: Job[M] = Job(task, taken)
                del taken, task  # the job alone says that it is worked on
                yield job
                del job


class WorkQueue(ChannelSpec, Generic[M]):
    """Declare a queue of tasks that this service works on, with their type: a msgspec Struct, or what an endpoint may take.

    It is a stream of JetStream: tasks survive restarts of workers and of NATS. A task is worked on at least once: it
    goes to another worker when the one that has it is not heard of for `lost_after_s`, `max_tries` times at most; then,
    or after `max_age_s`, it is dropped. `put` refuses more than `max_tasks` unfinished ones.
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
    """Put the channels of one live object, of which none may have been used so far, on `broker`."""
    instance.__dict__[_BROKER] = broker


def channels(cls: type[Any]) -> dict[str, ChannelSpec]:
    """attribute -> channel of a service class, inherited ones included. Raises GraphError when two have one name."""
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
            raise GraphError(f"{cls.__name__}.{attribute}: {other} has the name {channel.name!r} too")
    return found
