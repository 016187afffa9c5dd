"""Topics and work queues of a service in a process of a graph: their names in NATS."""

from __future__ import annotations

from collections.abc import Callable

from dynamo.runtime import DistributedRuntime
from dynamo.sdk.channels import Limits, Subscription
from dynamo.transport.queue import Queue


class ServiceChannels:
    """How the channels of one service, this process's own or another, reach NATS. It connects at the first use."""

    def __init__(self, runtime: DistributedRuntime, namespace: str, service: str) -> None:
        self._runtime = runtime
        self._stream = f"{namespace}_{service}_"
        self._queues: dict[str, Queue] = {}
        self._prefix = f"namespace.{namespace}.component.{service}."

    async def publish(self, topic: str, payload: bytes) -> None:
        await self._runtime.send(self._prefix + topic, payload)

    async def subscribe(self, topic: str, handler: Callable[[bytes], None]) -> Subscription:
        return await self._runtime.listen(self._prefix + topic, handler)

    def queue(self, name: str, limits: Limits) -> Queue:
        if name not in self._queues:
            subject = self._prefix + name
            self._queues[name] = self._runtime.work_queue(self._stream + name, subject, **limits._asdict())
        return self._queues[name]
