"""The planner's loop: one decision in an interval, carried out step by step, on a scaler that counts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from dynamo.errors import ConfigError, UnavailableError
from dynamo.planner.load_planner import LoadPlanner
from dynamo.planner.load_rule import LoadLimits, Pace, Sample
from dynamo.planner.loads import Address, Loads
from dynamo.planner.scaling import ServiceInfo, WorkerInfo
from dynamo.sdk.testing.memory import MemoryNetwork, MemoryRuntime

INTERVAL_S = 0.03
BUSY, IDLE, FULL = Sample(30, [0.7]), Sample(0, [0.7]), Sample(2, [0.99])


class Host:
    """A scaler and the loads of its workers: the numbers of workers, and the sample of each reading."""

    def __init__(self, sample: Sample, **workers: int) -> None:
        self.workers = workers
        self.current = sample
        self.steps: list[str] = []
        self.refused: set[str] = set()
        self.on_sample: Callable[[], None] = lambda: None

    async def services(self) -> list[ServiceInfo]:
        return [ServiceInfo("ns", name, count) for name, count in self.workers.items()]

    async def add(self, service: str) -> WorkerInfo:
        return self._step(f"+{service}", service, 1)

    async def remove(self, service: str, worker: str = "") -> WorkerInfo:
        return self._step(f"-{service}", service, -1)

    def _step(self, step: str, service: str, change: int) -> WorkerInfo:
        self.steps.append(step)
        if step in self.refused:
            raise ConfigError("no GPU is free")
        self.workers[service] += change
        return WorkerInfo(f"{service}:9", "ready")


class HostLoads(Loads):
    def __init__(self, host: Host) -> None:
        super().__init__(MemoryRuntime(MemoryNetwork(), 1))
        self.host = host

    def count(self, address: Address | None) -> int:
        return self.host.workers.get(address.service, 0) if address is not None else 0

    async def sample(self, decode: Address, prefill: Address | None) -> Sample:
        self.host.on_sample()
        return self.host.current


async def planned(host: Host, intervals: int = 1, *, changes: bool = True, **limits: float) -> list[str]:
    """Plan for some intervals and return the steps."""
    loads = HostLoads(host)
    pace = Pace(INTERVAL_S, INTERVAL_S / 3)
    planner = LoadPlanner(loads, host if changes else None, LoadLimits(**limits), pace, "ns")  # type: ignore[arg-type]
    for _ in range(intervals):
        await planner._plan_interval()
    return host.steps


async def test_one_step_in_each_interval() -> None:
    host = Host(BUSY, VllmWorker=1, PrefillWorker=1)
    assert await planned(host, 3) == ["+PrefillWorker"] * 3
    assert host.workers["PrefillWorker"] == 4


async def test_the_budget_ends_the_growth() -> None:
    assert await planned(Host(BUSY, VllmWorker=1, PrefillWorker=1), 5, max_gpus=4) == ["+PrefillWorker"] * 2


async def test_the_names_of_engine_v1() -> None:
    assert await planned(Host(BUSY, VllmDecodeWorker=1, VllmPrefillWorker=1)) == ["+VllmPrefillWorker"]


async def test_an_aggregated_graph() -> None:
    assert await planned(Host(Sample(None, [0.99]), VllmWorker=1)) == ["+VllmWorker"]


async def test_a_decode_worker_stays_for_three_intervals() -> None:
    host = Host(FULL, VllmWorker=1, PrefillWorker=1)
    loads = HostLoads(host)
    planner = LoadPlanner(loads, host, LoadLimits(), Pace(INTERVAL_S, INTERVAL_S), "ns")
    await planner._plan_interval()
    host.current = Sample(2, [0.1])
    for _ in range(2):
        await planner._plan_interval()
    assert host.steps == ["+VllmWorker"]
    await planner._plan_interval()
    assert host.steps == ["+VllmWorker", "-VllmWorker"]


async def test_no_decision_when_workers_came_or_went(caplog: pytest.LogCaptureFixture) -> None:
    host = Host(BUSY, VllmWorker=1, PrefillWorker=1)
    host.on_sample = lambda: host.workers.update(VllmWorker=2)
    caplog.set_level("INFO")
    assert await planned(host) == []
    assert "no decision: 1 -> 1 prefill, 1 -> 2 decode workers during the interval" in caplog.text


async def test_nothing_is_added_where_one_cannot_be_removed(caplog: pytest.LogCaptureFixture) -> None:
    host = Host(Sample(0, [0.99]), VllmWorker=2, PrefillWorker=2)
    host.refused.add("-PrefillWorker")
    assert await planned(host) == ["-PrefillWorker"]
    assert "-1 PrefillWorker failed: no GPU is free" in caplog.text


async def test_a_worker_that_cannot_be_added_does_not_stop_the_other_kind() -> None:
    host = Host(Sample(30, [0.99]), VllmWorker=1, PrefillWorker=1)
    host.refused.add("+PrefillWorker")
    assert await planned(host) == ["+PrefillWorker", "+VllmWorker"]


async def test_no_operation_logs_what_it_would_do(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert await planned(Host(IDLE, VllmWorker=2, PrefillWorker=2), changes=False) == []
    assert [r.message for r in caplog.records] == [
        "no operation: prefill queue 0.00 a worker, KV usage 0.70, 2 prefill and 2 decode workers, 4 of 8 GPUs: "
        "-1 prefill worker (queue 0.00 < 0.2)"
    ]


async def test_it_waits_for_the_workers_and_for_the_supervisor(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    host = Host(BUSY, VllmWorker=0, PrefillWorker=1)
    answers = iter([UnavailableError("the graph is starting")])
    services = host.services

    async def at_first_unavailable() -> list[ServiceInfo]:
        for error in answers:
            raise error
        return await services()

    host.services = at_first_unavailable  # type: ignore[method-assign]
    planner = LoadPlanner(HostLoads(host), host, LoadLimits(), Pace(INTERVAL_S, 0.001), "ns")
    task = asyncio.create_task(planner.run())
    async with asyncio.timeout(10):
        while "waiting for a VllmWorker" not in caplog.text:
            await asyncio.sleep(0.001)
        host.workers["VllmWorker"] = 1
        while not host.steps:
            await asyncio.sleep(0.001)
    task.cancel()
    assert "no decision: the graph is starting" in caplog.text
    assert caplog.text.count("waiting for a VllmWorker") == 1
