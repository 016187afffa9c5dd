"""Discovery: the live instances of an endpoint as etcd has them, kept while etcd is unavailable."""

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
"""How long instances are kept that are missing from an etcd which came back empty: they register again meanwhile."""

WATCH_RETRY_PAUSE_S = 0.5

_decode = msgspec.json.Decoder(Instance).decode


async def watch(etcd: Etcd, prefix: str) -> AsyncGenerator[Event, None]:
    """Watch a prefix like `Etcd.watch_prefix`, and retry while etcd is unavailable at the start or refuses."""
    while True:
        try:
            async with aclosing(etcd.watch_prefix(prefix)) as events:
                async for event in events:
                    yield event
            return  # the client was closed
        except TransportError as error:
            log.warning("cannot watch %s in etcd, retrying: %s", prefix, error)
            await asyncio.sleep(WATCH_RETRY_PAUSE_S)


class Discovery:
    """Follows the instances of one endpoint; calls `on_join(instance)` and `on_leave(id)` on the event loop.

    `on_join` is called again for an instance that registers again.
    """

    def __init__(
        self,
        etcd: Etcd,
        address: tuple[str, str, str],
        on_join: Callable[[Instance], None],
        on_leave: Callable[[InstanceId], None],
    ) -> None:
        self._etcd = etcd
        self._prefix = instances_prefix(*address)
        self._on_join = on_join
        self._on_leave = on_leave
        self._instance_of: dict[str, InstanceId] = {}  # by etcd key
        self._missing: dict[str, asyncio.TimerHandle] = {}  # by etcd key: runs out after RESET_GRACE_S

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
        self._stop_missing(key)
        try:
            instance = _decode(value)
        except msgspec.MsgspecError as error:
            log.warning("etcd key %s is not an instance: %s", key, error)
            return
        self._instance_of[key] = instance.id
        self._on_join(instance)

    def _leave(self, key: str) -> None:
        self._stop_missing(key)
        instance_id = self._instance_of.pop(key, None)
        if instance_id is not None:
            self._on_leave(instance_id)

    def _stop_missing(self, key: str) -> None:
        timer = self._missing.pop(key, None)
        if timer is not None:
            timer.cancel()

    def _reset(self, snapshot: Snapshot) -> None:
        loop = asyncio.get_running_loop()
        for key in self._instance_of.keys() - snapshot.items.keys() - self._missing.keys():
            self._missing[key] = loop.call_later(RESET_GRACE_S, self._leave, key)
        for key, value in snapshot.items.items():
            self._join(key, value)
