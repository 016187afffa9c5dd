"""The planner's loop: read the load, decide once in each interval, change the numbers of workers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

from dynamo.errors import DynamoError
from dynamo.planner.load_rule import GRACE_INTERVALS, LoadLimits, Pace, Sample, Step, Workers, decide
from dynamo.planner.loads import Address, Loads
from dynamo.planner.scaling import Scaler

log = logging.getLogger(__name__)

DECODE = ("VllmWorker", "VllmDecodeWorker")
PREFILL = ("PrefillWorker", "VllmPrefillWorker")
"""Names that the services have in graphs of ai-dynamo 0.2 and 0.3."""


class _Services(NamedTuple):
    """The services that are scaled. `prefill` None: an aggregated graph."""

    decode: Address
    prefill: Address | None


class LoadPlanner:
    """Scales the decode and prefill workers of a graph by `decide`.

    `scaler` None: decisions are logged and nothing is changed; `namespace` is that of the workers then.
    """

    def __init__(self, loads: Loads, scaler: Scaler | None, limits: LoadLimits, pace: Pace, namespace: str) -> None:
        self._loads = loads
        self._scaler = scaler
        self._limits = limits
        self._pace = pace
        self._namespace = namespace
        self._grace = 0  # intervals for which no decode worker is removed
        self._waiting = False

    async def run(self) -> None:
        """Plan until cancelled. Failures are logged, and the next interval tries again."""
        while True:
            try:
                await self._plan_interval()
            except DynamoError as error:
                log.warning("no decision: %s", error.message)
                await asyncio.sleep(self._pace.read_s)

    async def _plan_interval(self) -> None:
        """Collect samples for one interval, decide, and carry the decision out, which may take longer than an interval."""
        services = await self._services()
        before = self._count(services)
        if not before.decode:
            if not self._waiting:
                log.info("waiting for a %s", services.decode.service)
            self._waiting = True
            await asyncio.sleep(self._pace.read_s)
            return
        self._waiting = False
        samples = await self._collect(services)
        workers = self._count(services)
        if workers != before:
            changes = (
                f"{before.prefill} -> {workers.prefill} prefill, {before.decode} -> {workers.decode} decode workers"
            )
            log.info("no decision: %s during the interval", changes)
        else:
            decision = decide(samples, workers, self._limits, self._grace)
            log.info("%s%s", "" if self._scaler else "no operation: ", decision.text)
            if self._scaler is not None:
                await self._carry_out(self._scaler, decision.steps, services)
            self._grace = max(self._grace - 1, 0)

    async def _services(self) -> _Services:
        """Return the services to scale; by their usual names where no scaler knows them."""
        if self._scaler is None:
            return _Services(Address(self._namespace, DECODE[0]), Address(self._namespace, PREFILL[0]))
        known = {info.name: Address(info.namespace, info.name) for info in await self._scaler.services()}
        decode = next((known[name] for name in DECODE if name in known), Address(self._namespace, DECODE[0]))
        return _Services(decode, next((known[name] for name in PREFILL if name in known), None))

    def _count(self, services: _Services) -> Workers:
        return Workers(self._loads.count(services.prefill), self._loads.count(services.decode))

    async def _collect(self, services: _Services) -> list[Sample]:
        """Read the load until the interval is over."""
        samples = []
        end = time.monotonic() + self._pace.decide_s
        while True:
            samples.append(await self._loads.sample(services.decode, services.prefill))
            rest_s = end - time.monotonic()
            if rest_s <= 0:
                return samples
            await asyncio.sleep(min(self._pace.read_s, rest_s))

    async def _carry_out(self, scaler: Scaler, steps: Sequence[Step], services: _Services) -> None:
        """Add and remove workers, one after the other. Where one cannot be removed, none is added: its GPUs are not free."""
        for step in steps:
            address = services.decode if step.kind == "decode" else services.prefill
            assert address is not None
            started = time.monotonic()
            try:
                change = scaler.add if step.change > 0 else scaler.remove
                worker = await change(address.service)
            except DynamoError as error:
                log.warning("%+d %s failed: %s", step.change, address.service, error.message)
                if step.change < 0:
                    return
                continue
            done = "added" if step.change > 0 else "removed"
            log.info("%s %s in %.1f s", worker.name, done, time.monotonic() - started)
            if step.kind == "decode" and step.change > 0:
                self._grace = GRACE_INTERVALS
