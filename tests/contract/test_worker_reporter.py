"""A worker's KV events, load and snapshots over real NATS and the stream plane, and across an outage of NATS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from components.worker import VllmWorker
from dynamo.kv_router.events import KvEvents, KvSnapshot, SnapshotRequest, WorkerLoad
from dynamo.kv_router.hashing import BlockHash, unpack
from dynamo.launcher.embedded_servers import Infra
from dynamo.llm import worker_reporter
from dynamo.llm.protocol import GenerateRequest, Sampling
from dynamo.rpc.runtime import Runtime
from dynamo.sdk import Service, ServiceContext, bind, depends, direct, service
from dynamo.sdk.channels import attach
from dynamo.sdk.depends import Stub
from dynamo.sdk.spec import spec_of
from dynamo.worker.broker import ServiceBroker
from dynamo.worker.stubs import InstancePool
from tests.contract.rpc_steps import soon
from tests.unit.test_worker_reporter import FakeEngine

NAMESPACE = "dynamo"


@service
class Router(Service):
    worker = depends(VllmWorker)

    def __init__(self) -> None:
        self.kv: list[KvEvents] = []
        self.load: list[WorkerLoad] = []

    def held(self, after: int = 0, snapshot: set[BlockHash] | None = None) -> set[BlockHash]:
        held = snapshot or set()
        for message in self.kv:
            if message.sequence > after:
                for change in message.changes:
                    hashes = unpack(change.hashes)
                    held = held | set(hashes) if change.stored else held - set(hashes)
        return held


class Pair:
    def __init__(self, engine: FakeEngine, worker: VllmWorker, router: Router, runtimes: tuple[Runtime, ...]) -> None:
        self.engine = engine
        self.worker = worker
        self.router = router
        self.runtimes = runtimes
        self.id = runtimes[0].instance_id

    async def snapshot(self) -> list[KvSnapshot]:
        stream = direct(self.router.worker, self.id).kv_snapshot(SnapshotRequest())
        async with asyncio.timeout(5):
            return [part async for part in stream]


@pytest.fixture
async def pair(private_infra: Infra, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pair]:
    """A worker and a router, bound as the processes of a graph bind them."""

    def runtime(name: str) -> Runtime:
        return Runtime(
            nats_url=private_infra.nats_url, etcd_endpoints=private_infra.etcd_endpoints, run_dir=tmp_path, name=name
        )

    theirs, ours = runtime("worker"), runtime("router")
    await ours.connect()
    monkeypatch.setattr("dynamo.sdk.context._current", ServiceContext("VllmWorker", "dynamo", 1, 1, theirs, print))
    engine, router = FakeEngine(), Router()
    worker = VllmWorker(model="dynamo-tiny", engine="mock", router="kv")
    worker.engine = engine  # type: ignore[assignment]
    attach(worker, ServiceBroker(theirs, NAMESPACE, "VllmWorker"))
    caller = InstancePool(ours, VllmWorker, NAMESPACE)
    bind(router, worker=Stub(spec_of(VllmWorker), caller))
    await router.worker.kv_events.subscribe(router.kv.append)
    await router.worker.load.subscribe(router.load.append)
    await worker.start()
    for endpoint in spec_of(VllmWorker).endpoints.values():
        method: Any = getattr(worker, endpoint.method)
        await theirs.serve(NAMESPACE, "VllmWorker", endpoint.name, method, endpoint.types()[0])
    await caller.connect()
    for client in caller.clients.values():
        await client.wait_for_instances()
    yield Pair(engine, worker, router, (theirs, ours))
    await worker.stop()
    await asyncio.gather(theirs.close(), ours.close())


async def test_a_router_receives_changes_load_and_snapshots(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_reporter, "SNAPSHOT_HASHES", 1000)
    held = {block for prompt in range(50) for block in pair.engine.store(prompt * 1000, 50)}
    await soon(lambda: pair.router.held() == held)
    assert {message.worker for message in pair.router.kv} == {pair.id}
    parts = await pair.snapshot()
    assert [part.last for part in parts] == [False, False, True]
    assert {block for part in parts for block in unpack(part.hashes)} == held
    assert {part.sequence for part in parts} == {pair.router.kv[-1].sequence}
    stream = direct(pair.router.worker, pair.id).generate(GenerateRequest([1, 2, 3], Sampling(), "one"))
    await soon(lambda: any(load.accepted == ["one"] for load in pair.router.load))
    assert pair.router.load[-1].prefill_blocks == 1
    stream.cancel()
    await soon(lambda: pair.router.load[-1].prefill_blocks == 0)


async def test_the_largest_messages_pass(pair: Pair) -> None:
    held = set(pair.engine.store(0, 3 * worker_reporter.MESSAGE_HASHES // 2))
    await soon(lambda: len(pair.router.kv) == 2, 10)
    assert pair.router.held() == held
    assert {block for part in await pair.snapshot() for block in unpack(part.hashes)} == held


async def test_a_snapshot_closes_the_gap_after_an_outage_of_nats(pair: Pair, private_infra: Infra) -> None:
    held = set(pair.engine.store(0, 3))
    await soon(lambda: pair.router.kv)
    private_infra.processes["nats"].kill()
    assert pair.worker.reporter is not None
    rank = pair.worker.reporter._ranks[0]
    for prompt in range(1, 6):
        held |= set(pair.engine.store(prompt * 1000, 3))
        await soon(lambda number=prompt + 1: rank.sequence == number and not rank.unsent)
    lost = len(pair.router.kv)
    await private_infra.restart_nats()
    for runtime in pair.runtimes:
        await runtime.nats.wait_connected(10)
        await runtime.nats.flush()
    held |= set(pair.engine.store(50_000, 3))
    await soon(lambda: len(pair.router.kv) > lost, 10)
    assert pair.router.kv[-1].sequence == 7
    assert pair.router.held() != held
    parts = await pair.snapshot()
    assert pair.router.held(parts[-1].sequence, {b for part in parts for b in unpack(part.hashes)}) == held
    before = len(pair.router.load)
    await soon(lambda: len(pair.router.load) > before and pair.router.load[-1].kv_sequence == 7, 5)
