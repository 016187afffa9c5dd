"""Doubles: what a test puts behind a dependency with `bind`, in place of services in other processes.

Requests and items are encoded and decoded as between processes, so that a wrong type fails in the test too.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import itertools
import random
from collections.abc import AsyncIterable, Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

from dynamo import codec
from dynamo.context import deadline, request_id
from dynamo.errors import BadCallError, GraphError, NoInstancesError, UnavailableError, WorkerLostError
from dynamo.rpc.remote_errors import raised_in_another_process
from dynamo.sdk.channels import attach
from dynamo.sdk.depends import Choice, StartCall, Stub
from dynamo.sdk.endpoint import EndpointSpec
from dynamo.sdk.in_memory_broker import InMemoryBroker
from dynamo.sdk.spec import ServiceSpec, is_service, spec_of
from dynamo.streams import Channel, Reply, Stream
from dynamo.tasks import TaskSet

T = TypeVar("T")


class InstanceCall(NamedTuple):
    """A call that a double received: the endpoint's method name, the request, the instance that took it."""

    method: str
    request: Any
    instance_id: int


class MemoryPool:
    """Instances of one service in this process, numbered from 1, behind a stub."""

    def __init__(self, spec: ServiceSpec, instances: Iterable[object]) -> None:
        self.spec = spec
        self.broker = InMemoryBroker()
        self.instances: dict[int, object] = {}
        self.scopes: dict[int, contextvars.Context] = {}
        """context variables of the instances that run as services of a `TestGraph`"""
        self.calls: list[InstanceCall] = []
        self._running: dict[int, dict[Channel[Any], asyncio.Task[None]]] = {}
        self._next = itertools.count()
        self._tasks = TaskSet(f"calls of {spec.name}")
        for instance in instances:
            self.add(instance)

    def add(self, instance: object, number: int | None = None) -> None:
        """Add an instance with that id, by default the next one. Its topics and queues are those of the pool."""
        if number is None:
            number = max(self._running, default=0) + 1
        if is_service(type(instance)):
            attach(instance, self.broker)
        self.instances[number] = instance
        self._running[number] = {}

    def lose(self, instance_id: int) -> None:
        """Remove an instance as if its process had died: its running calls stop and end with WorkerLostError.

        Raises GraphError when there is none of that id.
        """
        if instance_id not in self.instances:
            known = ", ".join(map(str, self.instances)) or "none"
            raise GraphError(f"{self.spec.name} has no instance {instance_id}; it has {known}")
        del self.instances[instance_id]
        for channel, task in list(self._running[instance_id].items()):
            channel.end(WorkerLostError("the connection to the instance was lost while it was answering"))
            task.cancel()

    def instance_ids(self) -> list[int]:
        """Return the ids of the instances that can be called."""
        return list(self.instances)

    def in_flight(self) -> dict[int, int]:
        """Return the number of running calls by instance id."""
        return {number: len(self._running[number]) for number in self.instances}

    def endpoint(self, spec: EndpointSpec) -> StartCall:
        """Return the function that starts a call of one endpoint."""
        return partial(self._start, spec)

    def _start(self, spec: EndpointSpec, request: Any, choice: Choice, avoid: frozenset[int]) -> Stream[Any]:
        channel: Channel[Any] = Channel()
        stream = (Stream if spec.streaming else Reply)(channel)
        try:
            number = self._pick(spec, choice, avoid)
            request_type, item_type = spec.types()
            argument = codec.decoder(request_type)(codec.encode(request))
        except codec.DecodeError as error:
            channel.end(BadCallError(f"{self.spec.name}.{spec.name}: invalid request: {error.message}"))
            return stream
        except Exception as error:
            channel.end(error)
            return stream
        self.calls.append(InstanceCall(spec.method, argument, number))
        channel.source = number
        method = getattr(self.instances[number], spec.method)
        bound = partial(method, argument) if spec.parameter else method
        work = self._answer(number, channel, bound, codec.decoder(item_type))
        task = self._scope(number).run(partial(self._tasks.spawn, work, name=spec.method))
        self._running[number][channel] = task
        task.add_done_callback(partial(self._finish, number, channel))
        channel.on_cancel = task.cancel
        return stream

    def _finish(self, number: int, channel: Channel[Any], task: asyncio.Task[None]) -> None:
        """Forget a call that was cancelled, perhaps before it began; end it unless its caller cancelled it."""
        self._running[number].pop(channel, None)
        if task.cancelled():
            channel.end(UnavailableError("the call was cancelled"))

    def _scope(self, number: int) -> contextvars.Context:
        """Return the context variables of a call: the instance's own, with the request's id and deadline."""
        scope = self.scopes.get(number, contextvars.Context()).copy()
        scope.run(request_id.set, request_id.get())
        scope.run(deadline.set, deadline.get())
        return scope

    def _pick(self, spec: EndpointSpec, choice: Choice, avoid: frozenset[int]) -> int:
        ids = self.instance_ids()
        name = f"{self.spec.namespace}/{self.spec.name}/{spec.name}"
        if isinstance(choice, int):
            if choice not in ids:
                raise NoInstancesError(f"instance {choice:x} of {name} is not available")
            return choice
        ids = [number for number in ids if number not in avoid] or ids
        if not ids:
            raise NoInstancesError(f"no instance of {name} is available")
        load = self.in_flight()
        if choice == "random":
            return random.choice(ids)
        if choice == "power_of_two":
            return min(random.sample(ids, min(2, len(ids))), key=load.__getitem__)
        start = next(self._next) % len(ids)
        ids = ids[start:] + ids[:start]
        return min(ids, key=load.__getitem__) if choice == "least_loaded" else ids[0]

    async def _answer(
        self, number: int, channel: Channel[Any], method: Callable[[], Any], decode: codec.Decode
    ) -> None:
        """Run an endpoint; push its items, as another process would decode them, and the end."""
        error: Exception | None = None

        def push(item: Any) -> None:
            try:
                channel.push(decode(codec.encode(item)))
            except codec.DecodeError as fault:
                raise BadCallError(f"invalid response of {self.spec.name}:{number}: {fault.message}") from None

        try:
            result = method()
            if isinstance(result, AsyncIterable):
                async for item in result:
                    push(item)
            elif inspect.isawaitable(result):
                push(await result)
            else:
                raise TypeError(f"returned a {type(result).__name__}, not an async iterator or awaitable")
        except Exception as raised:
            if not raised_in_another_process(raised):
                raised.add_note(f"raised in {self.spec.name}:{number}")
            error = raised
        finally:
            self._running[number].pop(channel, None)  # before the caller sees the end
        channel.end(error)

    async def aclose(self) -> None:
        """Cancel what is running."""
        await self._tasks.aclose()


def pool(*instances: T, of: type[Any] | None = None) -> T:
    """Make a client of several instances in memory, with the ids 1, 2, …, for `bind(obj, worker=pool(a, b))`.

    `direct`, `least_loaded`, `avoiding`, `instance_ids`, `in_flight` and the other choice functions work on it. `of` is
    the service class whose endpoints are called, for instances that are fakes; by default that of the first instance.
    Raises GraphError when that is no service.
    """
    if not instances:
        raise GraphError("pool: expected at least one instance")
    spec = spec_of(type(instances[0]) if of is None else of)
    return cast("T", Stub(spec, MemoryPool(spec, instances)))


def double(service: type[T], **endpoints: Any) -> T:
    """Make a client of one stand-in for a service, which answers by method name: `double(Worker, generate=["a", "b"])`.

    A value is the result of a unary endpoint; a list holds the items of a streaming one; an exception is raised; a
    function gets the request (or nothing, where the endpoint takes none) and returns any of these, or is the endpoint
    itself: a coroutine function or an async generator function. Raises GraphError for a name that is no endpoint.
    """
    spec = spec_of(service)
    for name in endpoints:
        if name not in spec.endpoints:
            raise GraphError(
                f"double: {spec.name} has no endpoint {name!r}; it has {', '.join(spec.endpoints) or 'none'}"
            )
    methods = {name: _stand_in(spec, endpoint, endpoints) for name, endpoint in spec.endpoints.items()}
    stand_in = type(f"{spec.name}Double", (), {name: staticmethod(method) for name, method in methods.items()})()
    return pool(cast("T", stand_in), of=service)


def _stand_in(spec: ServiceSpec, endpoint: EndpointSpec, given: dict[str, Any]) -> Callable[..., Any]:
    """Return the method of a double for one endpoint."""
    name = endpoint.method

    def result(arguments: tuple[Any, ...]) -> Any:
        if name not in given:
            raise AssertionError(f"the double of {spec.name} was called at {name}, which it was not given")
        value = given[name]
        value = value(*arguments) if callable(value) and not isinstance(value, BaseException) else value
        if isinstance(value, BaseException):
            raise value
        return value

    async def unary(*arguments: Any) -> Any:
        value = result(arguments)
        return await value if inspect.isawaitable(value) else value

    async def streaming(*arguments: Any) -> Any:
        value = result(arguments)
        if isinstance(value, AsyncIterable):
            async for item in value:
                yield item
        else:
            for item in value:
                yield item

    return streaming if endpoint.streaming else unary


def calls(client: object) -> list[InstanceCall]:
    """Return the calls that a pool or a double has received, in order. Raises GraphError for any other client."""
    return _memory_pool(client).calls


def lose(client: object, instance_id: int) -> None:
    """Remove an instance of a pool as if its process had died; its running calls end with WorkerLostError."""
    _memory_pool(client).lose(instance_id)


def _memory_pool(client: object) -> MemoryPool:
    found = client._pool if isinstance(client, Stub) else None
    if not isinstance(found, MemoryPool):
        raise GraphError(f"expected a pool or a double of dynamo.sdk.testing, found {client!r}")
    return found
