"""The stubs of a service process: clients of the endpoints of each service that it depends on."""

from __future__ import annotations

from functools import partial
from typing import Any

from dynamo import codec
from dynamo.rpc.client import Client
from dynamo.rpc.runtime import Runtime
from dynamo.sdk.depends import Choice, StartCall
from dynamo.sdk.endpoint import EndpointSpec
from dynamo.sdk.spec import spec_of
from dynamo.streams import Reply, Stream
from dynamo.worker.broker import ServiceBroker


class InstancePool:
    """The instances of one service, for the stub of a dependency. Clients are made when the process connects."""

    def __init__(self, runtime: Runtime, cls: type[Any], namespace: str) -> None:
        self._runtime = runtime
        self._spec = spec_of(cls)
        self._namespace = namespace
        self.broker = ServiceBroker(runtime, namespace, self._spec.name)
        self.clients: dict[str, Client] = {}
        self._calls: dict[str, StartCall] = {}

    async def connect(self) -> None:
        """Make the client of each endpoint, which then follows the instances. Raises TransportError."""
        for endpoint in self._spec.endpoints.values():
            await self._connect(endpoint)

    async def _connect(self, endpoint: EndpointSpec) -> Client:
        client = await self._runtime.client(self._namespace, self._spec.name, endpoint.name)
        decode = codec.decoder(endpoint.types()[1])
        self.clients[endpoint.name] = client
        self._calls[endpoint.name] = partial(client.call, decode=decode, streaming=endpoint.streaming)
        return client

    def endpoint(self, spec: EndpointSpec) -> StartCall:
        """Return the function that starts a call: the client's own, once there is a client."""
        return self._calls.get(spec.name) or partial(self._connect_and_call, spec)

    def _connect_and_call(self, spec: EndpointSpec, request: Any, choice: Choice, avoid: frozenset[int]) -> Stream[Any]:
        """Call before the process has connected, as from a start hook: connect, wait for an instance, call.

        A method that was read from the stub before that, as in a constructor, calls the client directly afterwards.
        """
        if spec.name in self._calls:
            return self._calls[spec.name](request, choice, avoid)

        async def connected() -> Stream[Any]:
            client = await self._connect(spec)
            await client.wait_for_instances()
            return self._calls[spec.name](request, choice, avoid)

        return (Stream if spec.streaming else Reply).opening(connected())

    def instance_ids(self) -> list[int]:
        """Return the ids of the instances at which every endpoint can be called now."""
        ids = [set(client.instance_ids()) for client in self.clients.values()]
        return sorted(set.intersection(*ids)) if ids else []

    def in_flight(self) -> dict[int, int]:
        """Return the number of this process's running calls by instance id."""
        counts = {number: count for client in self.clients.values() for number, count in client.in_flight().items()}
        return {number: counts[number] for number in self.instance_ids()}
