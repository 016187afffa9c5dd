"""Topics and work queues of a service on NATS: their subjects and streams, and their deletion."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from dynamo.errors import TransportError
from dynamo.rpc.runtime import Runtime
from dynamo.sdk.broker import Limits, Subscription
from dynamo.sdk.channels import WorkQueue
from dynamo.sdk.spec import spec_of
from dynamo.transport.work_queue import JetStreamQueue

log = logging.getLogger(__name__)


class ServiceBroker:
    """Carries the channels of one service, this process's own or another, over NATS; connects at the first use."""

    def __init__(self, runtime: Runtime, namespace: str, service: str) -> None:
        self._runtime = runtime
        self._namespace = namespace
        self._service = service
        self._queues: dict[str, JetStreamQueue] = {}
        self._prefix = f"namespace.{namespace}.component.{service}."

    async def publish(self, topic: str, payload: bytes) -> None:
        await self._runtime.send(self._prefix + topic, payload)

    async def subscribe(self, topic: str, handler: Callable[[bytes], None]) -> Subscription:
        return await self._runtime.listen(self._prefix + topic, handler)

    def queue(self, name: str, limits: Limits) -> JetStreamQueue:
        if name not in self._queues:
            subject = self._prefix + name
            self._queues[name] = self._runtime.work_queue(
                _stream(self._namespace, self._service, name), subject, **limits._asdict()
            )
        return self._queues[name]


def _stream(namespace: str, service: str, queue: str) -> str:
    return f"{namespace}_{service}_{queue}"


def streams(services: Iterable[tuple[str, type]]) -> list[str]:
    """Return the names of the JetStream streams of `services`, (namespace, class) pairs."""
    return [
        _stream(namespace, cls.__name__, channel.name)
        for namespace, cls in services
        for channel in spec_of(cls).channels.values()
        if isinstance(channel, WorkQueue)
    ]


async def delete_queues(services: Sequence[tuple[str, type]], nats_url: str, etcd_endpoints: str) -> None:
    """Delete the work queues of a graph that has ended here, unless other hosts still run instances of it.

    Failures are logged.
    """
    names = streams(services)
    if not names:
        return
    # imported here: few graphs need them at their end
    from dynamo.transport.etcd import Etcd
    from dynamo.transport.nats import Nats
    from dynamo.transport.work_queue import delete

    try:
        async with Etcd.connect(etcd_endpoints) as etcd:
            for namespace, cls in services:
                living, _ = await etcd.get_prefix(f"instances/{namespace}/{cls.__name__}/")
                if living:
                    return
        nats = await Nats.connect(nats_url, name="dynamo serve")
        try:
            for name in names:
                await delete(nats, name)
        finally:
            await nats.close()
    except TransportError as error:
        log.warning("work queues left in NATS: %s: %s", ", ".join(names), error.message)
