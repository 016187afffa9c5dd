"""The runtime of services that share a test's process: keys and subjects in memory, without etcd and NATS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from dynamo.errors import NoInstancesError
from dynamo.rpc.metrics import ProcessMetrics


class MemoryNetwork:
    """Shared by the services of one graph: keys, as in etcd, and subjects, as in NATS."""

    def __init__(self) -> None:
        self.keys: dict[str, bytes] = {}
        self.changed = asyncio.Condition()
        self.handlers: dict[str, list[Callable[[bytes], None]]] = {}

    async def put(self, key: str, value: bytes) -> None:
        """Set a key and wake those who follow its prefix."""
        async with self.changed:
            self.keys[key] = value
            self.changed.notify_all()

    async def delete(self, keys: set[str]) -> None:
        """Remove keys."""
        async with self.changed:
            for key in keys:
                self.keys.pop(key, None)
            self.changed.notify_all()


class MemorySubscription:
    """A handler on a subject, until closed."""

    def __init__(self, handlers: list[Callable[[bytes], None]], handler: Callable[[bytes], None]) -> None:
        self._handlers = handlers
        self._handler = handler

    async def close(self) -> None:
        """Stop calling the handler; no-op the second time."""
        if self._handler in self._handlers:
            self._handlers.remove(self._handler)


class MemoryRuntime:
    """One service's runtime; see `dynamo.sdk.context.ProcessRuntime`."""

    requests_over_nats = False
    nats_away_s = 0.0

    def __init__(self, network: MemoryNetwork, instance_id: int) -> None:
        self.instance_id = instance_id
        self.metrics = ProcessMetrics(instance_id, {})
        self._network = network
        self._published: set[str] = set()

    async def publish(self, key: str, value: Any) -> None:
        """Put a value (as JSON) under a key that is removed when this service ends."""
        self._published.add(key)
        await self._network.put(key, msgspec.json.encode(value))

    async def follow(self, prefix: str) -> AsyncIterator[dict[str, bytes]]:
        """Yield all keys under a prefix now and after every change."""
        seen: dict[str, bytes] | None = None
        while True:
            async with self._network.changed:
                while (view := self._view(prefix)) == seen:
                    await self._network.changed.wait()
            seen = view
            yield dict(view)

    def _view(self, prefix: str) -> dict[str, bytes]:
        return {key: value for key, value in self._network.keys.items() if key.startswith(prefix)}

    async def send(self, subject: str, payload: bytes) -> None:
        """Call the handlers on a subject."""
        for handler in list(self._network.handlers.get(subject, ())):
            handler(payload)

    async def request(self, subject: str, payload: bytes, timeout_s: float) -> bytes:
        """Raise NoInstancesError: in memory, nothing answers on a subject."""
        raise NoInstancesError(f"nothing subscribes to {subject}")

    async def listen(self, subject: str, handler: Callable[[bytes], None]) -> MemorySubscription:
        """Call `handler` for each message on a subject until the returned subscription is closed."""
        handlers = self._network.handlers.setdefault(subject, [])
        handlers.append(handler)
        return MemorySubscription(handlers, handler)

    async def close(self) -> None:
        """Remove what this service has published."""
        await self._network.delete(self._published)
