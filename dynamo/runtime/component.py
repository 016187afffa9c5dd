"""The runtime without graphs: namespace -> component -> endpoint -> client, as in the 0.x binding.

    runtime = DistributedRuntime(loop, False)
    component = runtime.namespace("dynamo").component("backend")
    await component.create_service()
    await component.endpoint("generate").serve_endpoint(generate)            # in the worker: until it stops

    client = await runtime.namespace("dynamo").component("backend").endpoint("generate").client()
    await client.wait_for_instances()
    async for item in await client.random({"text": "hello"}):
        print(item.data())

It is built on the clients and connections that the services of a graph use.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from dynamo import codec
from dynamo.errors import DynamoError, NoInstancesError, RemoteError, TransportError
from dynamo.rpc.client import Client
from dynamo.rpc.messages import instances_prefix
from dynamo.streams import Channel, Stream

if TYPE_CHECKING:
    from dynamo.rpc.runtime import Runtime

T = TypeVar("T")

DISCOVERY_TIMEOUT_S = 1.0
DISCOVERY_PAUSE_S = 0.005


class HandlerError(RemoteError, ValueError):
    """A handler raised; its own exception is the `__cause__`. A ValueError too, which it was in ai-dynamo 0.3."""


class Namespace:
    """Separates the components of one deployment from those of another."""

    def __init__(self, runtime: Runtime, name: str) -> None:
        self.runtime = runtime
        self.name = name

    def component(self, name: str) -> Component:
        return Component(self.runtime, self.name, name)


class Component:
    """Processes that serve the same endpoints."""

    def __init__(self, runtime: Runtime, namespace: str, name: str) -> None:
        self.runtime = runtime
        self.namespace = namespace
        self.name = name

    async def create_service(self) -> None:
        """Connect, and respond to the NATS micro-service protocol from then on. Raises TransportError."""
        await self.runtime.connect()

    async def create_service_with_custom_lease(self, ttl: int = 1) -> PrimaryLease:
        """Connect, as `create_service`. The lease that 0.2 made is this process's own here, and `ttl` is ignored."""
        await self.create_service()
        return PrimaryLease(self.runtime)

    def endpoint(self, name: str) -> ComponentEndpoint:
        return ComponentEndpoint(self, name)

    def __repr__(self) -> str:
        return f"<component {self.namespace}.{self.name}>"


class ComponentEndpoint:
    """A function under an address."""

    def __init__(self, component: Component, name: str) -> None:
        self.component = component
        self.name = name
        self._runtime = component.runtime

    @property
    def address(self) -> tuple[str, str, str]:
        return self.component.namespace, self.component.name, self.name

    def lease_id(self) -> int:
        """Return the id of this process, as an instance and as an etcd lease; known before it connects."""
        return self._runtime.instance_id

    async def serve_endpoint(self, handler: Callable[[Any], Any], lease: object = None) -> None:
        """Serve until the runtime stops. `handler` is an async generator function, or a coroutine function for one item.

        It gets plain data, unless `@dynamo_endpoint` converts it. `lease` is accepted for 0.2 and ignored.
        """
        await self._runtime.serve(*self.address, handler)
        await self._runtime.stopped()

    async def client(self) -> ComponentClient:
        """Return a client, which knows the instances that are registered now. Raises TransportError."""
        client = await self._runtime.client(*self.address)
        if not self._runtime.is_static and not client.instance_ids():
            prefix = instances_prefix(*self.address)
            with contextlib.suppress(TimeoutError, TransportError):  # etcd is away, or one of them has died
                async with asyncio.timeout(DISCOVERY_TIMEOUT_S):
                    registered, _ = await self._runtime.etcd.get_prefix(prefix)
                    while len(client.instance_ids()) < len(registered):
                        await asyncio.sleep(DISCOVERY_PAUSE_S)
        return ComponentClient(client, static=self._runtime.is_static)

    def __repr__(self) -> str:
        return f"<endpoint {'.'.join(self.address)}>"


class PrimaryLease:
    """The lease of a process: everything it registers expires with it."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def id(self) -> int:
        return self._runtime.instance_id

    def revoke(self) -> None:
        """Deregister, finish running calls, and stop."""
        self._runtime.shutdown()

    async def is_valid(self) -> bool:
        return not self._runtime.is_stopped


class Annotated(Generic[T]):
    """An item of a response, wrapped as in the 0.x binding."""

    __slots__ = ("_data",)

    def __init__(self, data: T) -> None:
        self._data = data

    def data(self) -> T:
        return self._data

    def event(self) -> str | None:
        return None

    def comments(self) -> list[str]:
        return []

    def id(self) -> str | None:
        return None

    def is_error(self) -> bool:
        """Return False: the stream raises an error, after the items before it."""
        return False

    def __repr__(self) -> str:
        return f"Annotated(data={self._data!r}, event=None, comment=[], id=None)"


class ComponentClient:
    """Calls to one endpoint: the request is plain data, a pydantic model or its JSON text; items are `Annotated`.

    With `annotated=False` items are plain data. Raises NoInstancesError when no instance serves the endpoint; exceptions
    of the handler are raised by the stream as HandlerError.
    """

    def __init__(self, client: Client, *, static: bool) -> None:
        self._client = client
        self._static = static
        self._decode = codec.decoder(Any)

    @property
    def path(self) -> str:
        return f"instances/{'/'.join(self._client.address)}"

    def instance_ids(self) -> list[int]:
        """Return the ids of the instances that can be called now."""
        return self._client.instance_ids()

    endpoint_ids = instance_ids  # its name in 0.1 and 0.2

    async def wait_for_instances(self) -> list[int]:
        """Wait, without limit, for an instance; return the ids."""
        return await self._client.wait_for_instances()

    wait_for_endpoints = wait_for_instances

    def random(self, request: Any, annotated: bool = True) -> Awaitable[Stream[Any]]:
        return self._call(request, "random", annotated)

    def round_robin(self, request: Any, annotated: bool = True) -> Awaitable[Stream[Any]]:
        return self._call(request, "round_robin", annotated)

    def generate(self, request: Any, annotated: bool = True) -> Awaitable[Stream[Any]]:
        """Call a random instance; a static client has only one."""
        return self._call(request, "random", annotated)

    def direct(self, request: Any, instance_id: int, annotated: bool = True) -> Awaitable[Stream[Any]]:
        return self._call(request, int(instance_id), annotated)

    async def static(self, request: Any, annotated: bool = True) -> Stream[Any]:
        if not self._static:
            raise TransportError(
                f'static() on the client of endpoint "{self.path}", which is not static',
                hint="call random(), or make the runtime with is_static=True",
            )
        return await self._call(request, "round_robin", annotated)

    async def _call(self, request: Any, choice: str | int, annotated: bool) -> Stream[Any]:
        stream = self._client.call(request, choice, decode=self._decode, streaming=True)
        try:
            await stream
        except NoInstancesError as error:
            who = f"instance_id={choice} not found for endpoint" if isinstance(choice, int) else None
            text = f'{who or "no instances found for endpoint"} "{self.path}"'
            raise NoInstancesError(text, hint=error.hint) from None
        except Exception as error:  # it ended before the first item
            raise _handler_error(error) from error
        out: Channel[Any] = Channel(on_cancel=stream.cancel, on_consumed=stream.consumed)
        push = (lambda item: out.push(Annotated(item))) if annotated else out.push
        stream.pipe(push, lambda error: out.end(error and _handler_error(error)), counted=False)
        return Stream(out)


def _handler_error(error: BaseException) -> BaseException:
    """Return the error that 0.x raised for a handler's exception; errors of the connection unchanged."""
    if not isinstance(error, Exception) or (isinstance(error, DynamoError) and type(error) is not RemoteError):
        return error
    text = error.message if isinstance(error, RemoteError) else f"{type(error).__name__}: {error}"
    wrapped = HandlerError(f"a python exception was caught while processing the async generator: {text}")
    wrapped.__cause__ = error
    return wrapped
