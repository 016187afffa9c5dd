"""`service_context()`: what a served process provides to its component; None in plain Python."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import socket


class ProcessRuntime(Protocol):
    """This process's connections to etcd and NATS, which open at the first use.

    Methods raise TransportError while the server they need is unreachable, unless they say otherwise.
    """

    @property
    def instance_id(self) -> int:
        """Id of this process as an instance, and of its etcd lease."""
        ...

    @property
    def metrics(self) -> Any:
        """Metrics of this process (`registry`, `text`) and of the whole graph (`gather`)."""
        ...

    @property
    def requests_over_nats(self) -> bool: ...

    @property
    def nats_away_s(self) -> float:
        """Seconds since the NATS connection was lost; 0 while it is up, and before the first connection."""
        ...

    async def publish(self, key: str, value: Any) -> None:
        """Put a value (as JSON) under an etcd key that is removed when this process ends."""
        ...

    def follow(self, prefix: str) -> AsyncIterator[dict[str, bytes]]:
        """Yield all keys under an etcd prefix now and after every change; the last state while etcd is unreachable."""
        ...

    async def send(self, subject: str, payload: bytes) -> None:
        """Publish on a NATS subject."""
        ...

    async def request(self, subject: str, payload: bytes, timeout_s: float) -> bytes:
        """Send a request on a NATS subject and return the first answer. Raises NoInstancesError without a subscriber."""
        ...

    async def listen(self, subject: str, handler: Callable[[bytes], None]) -> Any:
        """Call `handler` for each message on a NATS subject until the returned subscription is closed."""
        ...


@dataclass
class ServiceContext:
    """One served process, from before its constructor runs until it ends."""

    service_name: str
    namespace: str
    worker_id: int
    """number of this process among the service's, from 1"""
    workers: int
    """how many processes the service has on this host"""
    runtime: ProcessRuntime
    progress: Callable[[str], None]
    """report what the start is waiting for; shown by `dynamo serve`"""
    endpoints: tuple[str, ...] = ()
    """names of the endpoints that this process registers, in alphabetical order of their methods"""
    graph: frozenset[tuple[str, str]] = frozenset()
    """namespace and name of each service of the graph"""
    scrape_targets: Callable[[], Awaitable[list[str]]] | None = None
    """list `host:port` of the metrics ports of all hosts, for Prometheus"""
    listen: Callable[[str, int], socket.socket] | None = None
    """open the listening socket for a host and port; several workers of one service share it"""
    in_memory: bool = False
    """no sockets: a component that has an HTTP server of its own leaves it unopened and keeps the ASGI app in `self.app`"""
    url: str = ""
    """of this process's HTTP server; empty before it listens"""
    headless: str = ""
    """a description such as "follower node 1", set by a start hook of a process that must not be called: it registers
    no endpoints"""

    def serve_at(self, url: str) -> None:
        """Set `url`, once the HTTP server listens."""
        self.url = url
        for observer in observers:
            observer(self)


observers: list[Callable[[ServiceContext], None]] = []
"""called when a process enters its context and when its URL is known; the 0.x `dynamo_context` is filled by one"""

_current: ServiceContext | None = None
_entered: ContextVar[ServiceContext | None] = ContextVar("service_context", default=None)
"""set where several services share a process, as in `dynamo.sdk.testing.TestGraph`"""


def service_context() -> ServiceContext | None:
    """Return the context of this service process; None in plain Python, as in a unit test."""
    return _entered.get() or _current


def enter_task(context: ServiceContext) -> None:
    """Make `context` the one of the current task and of those that it starts."""
    _entered.set(context)


def enter(context: ServiceContext) -> None:
    """Make `context` the one that `service_context()` returns from now on."""
    global _current
    _current = context
    for observer in observers:
        observer(context)
