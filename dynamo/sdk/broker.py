"""The broker behind the channels of a service: NATS in a served process, memory in a test."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import NamedTuple, Protocol


class Subscription(Protocol):
    async def close(self) -> None:
        """Stop the messages; no-op the second time."""


class Delivery(Protocol):
    """A task as bytes, checked out by this process."""

    @property
    def payload(self) -> bytes: ...
    @property
    def tries(self) -> int: ...
    async def done(self) -> None: ...
    async def fail(self) -> None: ...
    async def drop(self, reason: str) -> None: ...


class Tasks(Protocol):
    """A work queue of bytes."""

    async def put(self, payload: bytes) -> None: ...
    async def size(self) -> int: ...
    async def waiting(self) -> int: ...
    def take(self, limit: int) -> AsyncGenerator[Delivery, None]: ...


class Limits(NamedTuple):
    """Limits of a work queue; see `WorkQueue`."""

    max_tasks: int
    max_age_s: float
    max_tries: int
    lost_after_s: float


class Broker(Protocol):
    """Carries the channels of one service to other processes."""

    async def publish(self, topic: str, payload: bytes) -> None: ...
    async def subscribe(self, topic: str, handler: Callable[[bytes], None]) -> Subscription: ...
    def queue(self, name: str, limits: Limits) -> Tasks: ...
