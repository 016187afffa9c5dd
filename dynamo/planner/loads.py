"""What the planner sees: the instances of a service on all hosts, and the statistics that they report."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from dynamo.errors import DynamoError
from dynamo.planner.load_rule import Sample, kv_load
from dynamo.rpc.messages import Instance
from dynamo.rpc.nats_service import service_name
from dynamo.sdk.context import ProcessRuntime

log = logging.getLogger(__name__)

INSTANCES = "instances/"
STATS_TIMEOUT_S = 1.0


class Address(NamedTuple):
    """A service."""

    namespace: str
    service: str


class Loads:
    """Reads the load of services. `follow` must run meanwhile."""

    def __init__(self, runtime: ProcessRuntime) -> None:
        self._runtime = runtime
        self._instances: dict[Address, set[int]] = {}

    async def follow(self) -> None:
        """Keep the lists of instances up to date, until cancelled."""
        async for items in self._runtime.follow(INSTANCES):
            found: dict[Address, set[int]] = {}
            for value in items.values():
                try:
                    instance = msgspec.json.decode(value, type=Instance)
                except msgspec.MsgspecError:  # of another version
                    continue
                found.setdefault(Address(instance.namespace, instance.component), set()).add(instance.instance_id)
            self._instances = found

    def count(self, address: Address | None) -> int:
        """Return how many instances a service has."""
        return len(self._instances.get(address, ())) if address is not None else 0

    async def sample(self, decode: Address, prefill: Address | None) -> Sample:
        """Read the load of all decode workers and the length of the prefill queue, as the prefill workers report it."""
        decoding, prefilling = await asyncio.gather(self._stats(decode), self._stats(prefill))
        kv = [
            kv_load(usage, _number(stats, "num_requests_waiting") or 0.0)
            for stats in decoding
            if (usage := _number(stats, "gpu_cache_usage_perc")) is not None
        ]
        queue = [waiting for stats in prefilling if (waiting := _number(stats, "prefill_queue_waiting")) is not None]
        return Sample(max(queue, default=None), kv)

    async def _stats(self, address: Address | None) -> list[Mapping[str, Any]]:
        if address is None:
            return []
        instances = self._instances.get(address, ())
        answers = await asyncio.gather(*(self._ask(address, instance) for instance in instances))
        return [answer for answer in answers if answer is not None]

    async def _ask(self, address: Address, instance: int) -> Mapping[str, Any] | None:
        """Return the statistics of one instance; None if it does not answer with any."""
        subject = f"$SRV.STATS.{service_name(*address)}.{instance:x}"
        try:
            answer = msgspec.json.decode(await self._runtime.request(subject, b"", STATS_TIMEOUT_S))
            merged: dict[str, Any] = {}
            for endpoint in answer["endpoints"]:
                merged.update(endpoint["data"])
            return merged
        except (DynamoError, msgspec.MsgspecError, KeyError, TypeError, ValueError) as error:
            log.debug("no statistics of %s %x: %r", address.service, instance, error)
            return None


def _number(stats: Mapping[str, Any], name: str) -> float | None:
    """Return a number as a float; None for anything else, since services are free in what they report."""
    value = stats.get(name)
    return float(value) if isinstance(value, int | float) else None
