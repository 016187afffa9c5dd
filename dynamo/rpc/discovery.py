"""Which instances of an endpoint live: etcd's view, kept through its outages."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec

from dynamo.errors import TransportError
from dynamo.rpc.messages import Instance, InstanceId, instances_prefix
from dynamo.transport.etcd import Delete, Etcd, Event, Put, Snapshot

log = logging.getLogger(__name__)

RESET_GRACE_S = 8.0
"""How long instances stay that are missing from an etcd which came back empty: their owners register again meanwhile."""

RETRY_S = 0.5

_decode = msgspec.json.Decoder(Instance).decode


async def watch(etcd: Etcd, prefix: str) -> AsyncGenerator[Event, None]:
    """`Etcd.watch_prefix` that also outlives an etcd which is away at the start, or refuses for a time."""
    while True:
        try:
            async with aclosing(etcd.watch_prefix(prefix)) as events:
                async for event in events:
                    yield event
            return  # the client was closed
        except TransportError as error:
            log.warning("cannot follow %s in etcd, trying again: %s", prefix, error)
            await asyncio.sleep(RETRY_S)


class Discovery:
    """The live instances of one endpoint. `on_join(instance)` and `on_leave(id)` run on the event loop."""

    def __init__(
        self,
        etcd: Etcd,
        address: tuple[str, str, str],
        on_join: Callable[[Instance], None],
        on_leave: Callable[[InstanceId], None],
    ) -> None:
        self._etcd, self._prefix = etcd, instances_prefix(*address)
        self._on_join, self._on_leave = on_join, on_leave
        self._known: dict[str, InstanceId] = {}
        self._missing: dict[str, asyncio.TimerHandle] = {}

    async def run(self) -> None:
        """Follow etcd until cancelled, or until its client closes."""
        try:
            async with aclosing(watch(self._etcd, self._prefix)) as events:
                async for event in events:
                    if isinstance(event, Put):
                        self._join(event.key, event.value)
                    elif isinstance(event, Delete):
                        self._leave(event.key)
                    else:
                        self._reset(event)
        finally:
            for timer in self._missing.values():
                timer.cancel()

    def _join(self, key: str, value: bytes) -> None:
        timer = self._missing.pop(key, None)
        if timer is not None:
            timer.cancel()
        try:
            instance = _decode(value)
        except msgspec.MsgspecError as error:
            log.warning("etcd key %s is not an instance: %s", key, error)
            return
        self._known[key] = instance.id
        self._on_join(instance)

    def _leave(self, key: str) -> None:
        timer = self._missing.pop(key, None)
        if timer is not None:
            timer.cancel()
        found = self._known.pop(key, None)
        if found is not None:
            self._on_leave(found)

    def _reset(self, snapshot: Snapshot) -> None:
        loop = asyncio.get_running_loop()
        for key in self._known.keys() - snapshot.items.keys() - self._missing.keys():
            self._missing[key] = loop.call_later(RESET_GRACE_S, self._leave, key)
        for key, value in snapshot.items.items():
            self._join(key, value)
