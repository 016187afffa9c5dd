"""Work on the etcd of the deployment that a command is about."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from dynamo.transport.etcd import Etcd

T = TypeVar("T")


def with_etcd(work: Callable[[Etcd], Awaitable[T]]) -> T:
    """Run `work` with a connection to the etcd of the one deployment that is found, and return its result.

    Raises StartError if several deployments run here, TransportError if etcd is not reachable.
    """
    from dynamo.cli.deployments import single_deployment

    async def run() -> T:
        async with single_deployment().etcd() as etcd:
            return await work(etcd)

    return asyncio.run(run())
