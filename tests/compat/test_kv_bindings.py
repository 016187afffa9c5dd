"""Routers and workers with the bindings of ai-dynamo 0.1 to 0.3, in several processes, over real NATS and etcd."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import asdict
from typing import Any

import msgspec
import pytest

from dynamo.compat import router_events
from dynamo.kv_router.events import BlocksRemoved, BlocksStored, Change, KvEvents
from dynamo.launcher.embedded_servers import Infra
from dynamo.llm import (
    DisaggregatedRouter,
    ForwardPassMetrics,
    KvEventPublisher,
    KvIndexer,
    KvMetricsAggregator,
    KvMetricsPublisher,
    KvStats,
    RadixTree,
    WorkerStats,
    ZmqKvEventListener,
    ZmqKvEventPublisher,
    ZmqKvEventPublisherConfig,
    compute_block_hash_for_seq_py,
)
from dynamo.runtime import DistributedRuntime
from tests.ports import free_port
from tests.served import ROOT

BLOCK = 4
PROMPT = list(range(3 * BLOCK))


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 15.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.01)


async def scored(indexer: Any, tokens: list[int], expected: dict[int, int]) -> None:
    """Wait until the look-up of a prompt gives `expected`, by tokens and by hashes."""

    async def same() -> bool:
        found = await indexer.find_matches_for_request(tokens, 0)
        by_hash = await indexer.find_matches(compute_block_hash_for_seq_py(tokens, indexer.block_size()))
        return bool(found.scores == by_hash.scores == expected)

    await until(same)


@pytest.fixture
def namespace() -> str:
    return f"t{uuid.uuid4().hex[:12]}"


Connect = Callable[[], DistributedRuntime]


@pytest.fixture
async def connect(nats_server: str, etcd_server: str) -> AsyncIterator[Connect]:
    """A function that makes runtimes, which are closed at the end."""
    made: list[DistributedRuntime] = []

    def connect() -> DistributedRuntime:
        made.append(DistributedRuntime(None, False, nats_url=nats_server, etcd_endpoints=etcd_server))
        return made[-1]

    yield connect
    for runtime in made:
        await runtime.close()


@pytest.fixture
def start_worker(nats_server: str, etcd_server: str, namespace: str) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """A function that starts `kv_worker_03` in a process of its own."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.compat.graphs.kv_worker_03", namespace], cwd=ROOT, text=True,
                env=os.environ | {"NATS_SERVER": nats_server, "ETCD_ENDPOINTS": etcd_server}, stdout=subprocess.PIPE,
            )
        )  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


async def test_a_router_sees_workers_of_other_processes(
    connect: Connect, namespace: str, start_worker: Callable[[], subprocess.Popen[str]]
) -> None:
    component = connect().namespace(namespace).component("MyWorker")
    indexer, aggregator = KvIndexer(component, BLOCK), KvMetricsAggregator(component)
    assert (await indexer.find_matches_for_request(PROMPT, 0)).scores == {}
    assert (await aggregator.get_metrics()).endpoints == []
    client = await component.endpoint("generate").client()
    processes = [start_worker(), start_worker()]

    async def both() -> bool:
        return len(client.instance_ids()) == 2

    await until(both)
    first, second = client.instance_ids()

    async def call(worker: int, **request: Any) -> None:
        async for _ in await client.direct(request, worker):
            pass

    await call(first, store=[[100, 101], PROMPT[: 2 * BLOCK], None])
    await call(first, store=[[-102], PROMPT[2 * BLOCK :], 101])
    await call(second, store=[[100], PROMPT[:BLOCK], None])
    await scored(indexer, PROMPT, {first: 3, second: 1})
    late = KvIndexer(component, BLOCK)
    await scored(late, PROMPT, {first: 3, second: 1})
    await call(first, remove=[-102])
    for one in (indexer, late):
        await scored(one, PROMPT, {first: 2, second: 1})

    await call(first, load=[2, 300, 1])
    await call(second, load=[0, 100, 0])
    found: Any = None

    async def loads() -> bool:
        nonlocal found
        found = await aggregator.get_metrics()
        return [endpoint.kv_active_blocks for endpoint in by_worker()] == [300, 100]

    def by_worker() -> list[Any]:
        return sorted(found.endpoints, key=lambda endpoint: endpoint.worker_id != first)

    await until(loads)
    assert asdict(by_worker()[0]) == {
        "worker_id": first, "request_active_slots": 2, "request_total_slots": 64, "num_requests_waiting": 1,
        "kv_active_blocks": 300, "kv_total_blocks": 1000, "gpu_cache_usage_perc": 0.3, "gpu_prefix_cache_hit_rate": 0.25,
    }  # fmt: skip
    assert (found.load_avg, found.load_std) == (200, 100)

    processes[0].send_signal(signal.SIGTERM)
    output, _ = await asyncio.to_thread(processes[0].communicate, timeout=20)
    assert output == "metrics end\n"

    async def one_is_left() -> bool:
        scores = (await indexer.find_matches_for_request(PROMPT, 0)).scores
        metrics = await aggregator.get_metrics()
        left = set(client.instance_ids())
        return len(left) == 1 and scores.keys() == {endpoint.worker_id for endpoint in metrics.endpoints} == left

    await until(one_is_left)


async def test_indexer_reads_what_ai_dynamos_publishers_send(
    connect: Connect, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = connect()
    component = runtime.namespace(namespace).component("Worker")
    indexer = KvIndexer(component, BLOCK)
    await scored(indexer, PROMPT, {})
    subject = f"namespace.{namespace}.component.Worker.kv_events"
    hashes = compute_block_hash_for_seq_py(PROMPT, BLOCK)
    blocks = [{"block_hash": 2**64 - 1 - n, "tokens_hash": tokens} for n, tokens in enumerate(hashes)]

    async def send(data: Any) -> None:
        event = {"worker_id": -7, "event": {"event_id": 0, "data": data}}
        await runtime.inner.send(subject, json.dumps(event).encode())

    await runtime.inner.send(subject, msgspec.msgpack.encode(KvEvents(1, 0, 1, [Change(True, b"\0" * 8)])))
    await runtime.inner.send(subject, b'{"worker_id": 1}')
    await send({"stored": {"parent_hash": None, "blocks": blocks}})
    await scored(indexer, PROMPT, {-7: 3})
    await send({"removed": {"block_hashes": [2**64 - 3]}})
    await scored(indexer, PROMPT, {-7: 2})
    await send("cleared")
    await scored(indexer, PROMPT, {})
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [f"dropped a KV event of {namespace}.Worker: Object missing required field `event`"]


async def test_blocks_of_another_size_are_left_out(
    connect: Connect, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    component = connect().namespace(namespace).component("Worker")
    indexer, publisher = KvIndexer(component, BLOCK), KvEventPublisher(component, 5, BLOCK)
    for event in (1, 2):
        publisher.publish_stored(event, PROMPT[:10], [BLOCK, BLOCK, 2], [1, 2, 3], 0)
    await scored(indexer, PROMPT, {5: 2})
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        "KV blocks of 2 tokens, not 4, are not published"
    ]
    for create in (lambda: KvIndexer(component, 0), lambda: KvEventPublisher(component, 5, 0)):
        with pytest.raises(ValueError, match="kv_block_size: expected more than 0"):
            create()


async def test_many_blocks_go_in_several_messages(
    connect: Connect, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_events, "MESSAGE_BLOCKS", 2)
    runtime = connect()
    component = runtime.namespace(namespace).component("Worker")
    prompt = list(range(7 * BLOCK))
    publisher = KvEventPublisher(component, 5, BLOCK)
    early = KvIndexer(component, BLOCK)
    await scored(early, prompt, {})
    sizes: list[int] = []
    await runtime.inner.listen(
        f"namespace.{namespace}.component.Worker.{router_events.TOPIC}",
        lambda payload: sizes.append(payload.count(b"tokens_hash")),
    )
    publisher.publish_stored(1, prompt, [BLOCK] * 7, list(range(7)))
    await scored(early, prompt, {5: 7})
    await scored(KvIndexer(component, BLOCK), prompt, {5: 7})
    assert set(sizes) == {0, 1, 2}  # 0: the whole cache follows


async def test_events_lost_with_the_connection_are_made_up_for(private_infra: Infra, namespace: str) -> None:
    runtimes = [
        DistributedRuntime(None, False, nats_url=private_infra.nats_url, etcd_endpoints=private_infra.etcd_endpoints)
        for _ in range(2)
    ]
    here, there = (runtime.namespace(namespace).component("Worker") for runtime in runtimes)
    indexer, publisher = KvIndexer(here, BLOCK), KvEventPublisher(there, 5, BLOCK)
    publisher.publish_stored(1, PROMPT, [BLOCK] * 3, [1, 2, 3])
    await scored(indexer, PROMPT, {5: 3})
    await private_infra.embedded["nats"].stop()

    async def lost() -> bool:
        return not runtimes[1].inner.nats.connected

    await until(lost)
    publisher.publish_removed(2, [2, 3])
    await private_infra.restart_nats()
    await scored(indexer, PROMPT, {5: 1})
    for runtime in runtimes:
        await runtime.close()


async def test_a_worker_that_publishes_on_demand(
    connect: Connect, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_events, "WANTED_FOR_S", 600)
    worker, here = connect().inner, connect()
    sent: list[bytes] = []
    prefix = router_events.topic_prefix(namespace, "Worker")
    await here.inner.listen(prefix + router_events.TOPIC, sent.append)
    publisher = router_events.CachePublisher(worker, namespace, "Worker", 5, on_demand=True)
    await publisher.start()
    publisher.publish_changes([BlocksStored([1, 2], None, PROMPT[: 2 * BLOCK], BLOCK)], BLOCK)

    async def announce(listener: bytes, messages: int) -> list[Any]:
        async def arrived() -> bool:
            await here.inner.send(prefix + router_events.WANTED_TOPIC, listener)
            return len(sent) >= messages

        await until(arrived)
        return [msgspec.json.decode(payload)["event"]["data"] for payload in sent]

    assert await announce(b"a", 1) == ["cleared"], "nothing is kept without a listener"
    stored = BlocksStored([3], None, PROMPT[:BLOCK], BLOCK)
    publisher.publish_changes([stored, stored, BlocksStored([4], 2, PROMPT[:BLOCK], BLOCK)], BLOCK)
    publisher.publish_changes([BlocksRemoved([3]), BlocksStored([5], 3, PROMPT[:8], 8)], BLOCK)
    hashes = compute_block_hash_for_seq_py(PROMPT, BLOCK)
    one = {"stored": {"parent_hash": None, "blocks": [{"block_hash": 3, "tokens_hash": hashes[0]}]}}
    assert await announce(b"b", 5) == ["cleared", one, one, "cleared", one], "it was stored twice"
    publisher.publish_changes([BlocksRemoved([3])], BLOCK)
    assert (await announce(b"b", 6))[5:] == [{"removed": {"block_hashes": [3]}}]
    publisher.publish_changes([stored], BLOCK)
    await announce(b"b", 7)
    publisher._wanted_until_s = 0.0  # as after `WANTED_FOR_S` without an announcement
    publisher.publish_changes([BlocksStored([6], 3, PROMPT[BLOCK : 2 * BLOCK], BLOCK)], BLOCK)
    both = {
        "stored": {
            "parent_hash": None,
            "blocks": [*one["stored"]["blocks"], {"block_hash": 6, "tokens_hash": hashes[1]}],
        }
    }
    assert (await announce(b"b", 9))[7:] == ["cleared", both], "nothing was sent meanwhile, but it knows all"
    await publisher.close()


async def test_metrics_of_all_releases(connect: Connect, namespace: str) -> None:
    component = connect().namespace(namespace).component("Worker")
    aggregator, publisher = KvMetricsAggregator(component), KvMetricsPublisher()
    serving = asyncio.create_task(publisher.create_endpoint(component, lease=None))
    numbers = {
        "request_active_slots": 1, "request_total_slots": 64, "kv_active_blocks": 5, "kv_total_blocks": 100,
        "num_requests_waiting": 3, "gpu_cache_usage_perc": 0.05, "gpu_prefix_cache_hit_rate": 0.5,
    }  # fmt: skip

    async def found(**expected: float) -> None:
        async def same() -> bool:
            endpoints = (await aggregator.get_metrics()).endpoints
            return [{name: getattr(e, name) for name in expected} for e in endpoints] == [expected]

        await until(same)

    await found(**dict.fromkeys(numbers, 0))
    publisher.publish(*numbers.values())
    await found(**numbers)
    publisher.publish(ForwardPassMetrics(WorkerStats(7, 8, 9), KvStats(1, 2, 0.5, 0.0)))
    await found(request_active_slots=7, num_requests_waiting=9, kv_active_blocks=1)
    publisher.publish(**numbers, data_parallel_rank=0)
    await found(**numbers)
    client = await component.endpoint("load_metrics").client()
    await client.wait_for_instances()
    (answer,) = [item async for item in await client.random(None, annotated=False)]
    assert answer["worker_stats"] == {
        "data_parallel_rank": 0, "request_active_slots": 1, "request_total_slots": 64, "num_requests_waiting": 3,
    }  # fmt: skip
    component.runtime.shutdown()
    await asyncio.wait_for(serving, 10)


async def test_workers_without_load_are_left_out(connect: Connect, namespace: str) -> None:
    component = connect().namespace(namespace).component("Worker")
    aggregator = KvMetricsAggregator(component)
    await component.runtime.serve(namespace, "Worker", "generate", str, stats_data=lambda: {"kv_total_blocks": "many"})
    seen: list[bytes] = []
    inbox = component.runtime.nats.new_inbox()
    await component.runtime.listen(inbox, seen.append)
    await component.runtime.nats.publish(f"$SRV.STATS.{namespace}_worker", b"", inbox)

    async def answered() -> bool:
        return bool(seen)

    await until(answered)
    assert (await aggregator.get_metrics()).endpoints == []


async def test_disaggregated_router_follows_etcd(
    connect: Connect, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = connect()
    model = f"org/{namespace}"
    router = DisaggregatedRouter(runtime, model, 100)
    assert router.get_model_name() == model
    assert (router.prefill_remote(150, 50), router.prefill_remote(151, 50)) == (False, True)
    await runtime.inner.connect()
    key = f"public/components/disagg_router/models/chat/{model}"

    async def limit(expected: int) -> None:
        async def same() -> bool:
            return (router.prefill_remote(expected, 0), router.prefill_remote(expected + 1, 0)) == (False, True)

        await until(same)

    await runtime.inner.publish(f"{key}-large", {"max_local_prefill_length": 1})
    await runtime.inner.publish(key, {"max_local_prefill_length": 2000})
    await limit(2000)
    await runtime.inner.publish(key, {"max_local_prefill_length": "many"})

    async def warned() -> bool:
        return f"etcd {key}: Expected `int`, got `str`" in caplog.text

    await until(warned)
    await limit(2000)
    await runtime.inner.deregister()
    await limit(100)
    router.update_value(7)
    await limit(7)


class Vllm:
    """A socket that publishes as vLLM's engine core does."""

    def __init__(self, port: int) -> None:
        import zmq

        self.socket = zmq.Context.instance().socket(zmq.PUB)
        deadline = time.monotonic() + 10
        while True:  # the port of a socket that was closed is free a moment later
            try:
                self.socket.bind(f"tcp://127.0.0.1:{port}")
                break
            except zmq.ZMQError:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        self.sequence = 0

    def publish(self, *events: Any) -> None:
        payload = msgspec.msgpack.encode([0.5, events, 0])
        self.socket.send_multipart([b"kv-events", self.sequence.to_bytes(8, "big"), payload])
        self.sequence += 1

    def close(self) -> None:
        self.socket.close(linger=0)


def stored(*hashes: int, parent: int | None = None, tokens: list[int]) -> dict[str, Any]:
    fields = {"block_hashes": hashes, "parent_block_hash": parent, "token_ids": tokens, "block_size": BLOCK}
    return {"type": "BlockStored", "lora_id": None, "medium": "GPU", "lora_name": None, **fields}


def as_array(event: dict[str, Any]) -> list[Any]:
    """Return an event in the layout of vLLM of 2025 and of SGLang."""
    names = ("type", "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id")
    return [event[name] for name in names if name in event]


async def test_events_of_vllm_reach_the_routers(connect: Connect, namespace: str) -> None:
    runtime = connect()
    component = runtime.namespace(namespace).component("Worker")
    port = free_port()
    config = ZmqKvEventPublisherConfig(5, BLOCK, zmq_endpoint=f"tcp://127.0.0.1:{port}", zmq_topic="kv-")
    other = ZmqKvEventPublisherConfig(worker_id=6, kv_block_size=BLOCK, zmq_endpoint=config.zmq_endpoint, zmq_topic="x")
    indexer = KvIndexer(component, BLOCK)
    publishers = [ZmqKvEventPublisher(component=component, config=one) for one in (config, other)]
    vllm = Vllm(port)

    async def arrived() -> bool:  # a subscription takes a moment
        vllm.publish(stored(1, 2, tokens=PROMPT[:8]))
        await asyncio.sleep(0.02)
        return bool((await indexer.find_matches_for_request(PROMPT)).scores)

    await until(arrived)
    vllm.publish({"type": "BlockRemoved", "block_hashes": [2], "medium": "GPU"})
    vllm.publish({"type": "AllBlocksCleared"}, stored(1, tokens=PROMPT[:4]), stored(2, parent=1, tokens=PROMPT[4:8]))
    vllm.publish(as_array(stored(3, parent=2, tokens=PROMPT[8:])))
    await scored(indexer, PROMPT, {5: 3})
    vllm.publish(["BlockRemoved", [3]])
    await scored(indexer, PROMPT, {5: 2})

    for publisher in publishers:
        publisher.shutdown()
    vllm.close()


async def test_listener_collects_events_for_a_radix_tree() -> None:
    port = free_port()
    listener = ZmqKvEventListener(f"tcp://127.0.0.1:{port}", "", BLOCK)
    tree = RadixTree()
    vllm = Vllm(port)
    expected = {0: 2}

    async def collected() -> bool:
        for text in await listener.get_events():
            tree.apply_event(0, json.dumps(json.loads(text)).encode())
        return tree.find_matches(compute_block_hash_for_seq_py(PROMPT, BLOCK)).scores == expected

    async def arrived() -> bool:
        vllm.publish(stored(1, 2, tokens=PROMPT[:8]))
        await asyncio.sleep(0.02)
        return await collected()

    await until(arrived)
    assert await listener.get_events() == []
    vllm.publish({"type": "BlockRemoved", "block_hashes": [2], "medium": "GPU"})
    expected = {0: 1}
    await until(collected)
    vllm.close()  # the engine restarts, with an empty cache, and counts its messages from 0
    vllm = Vllm(port)
    expected = {0: 3}

    async def arrived_again() -> bool:
        vllm.sequence = 0
        vllm.publish(stored(7, 8, 9, tokens=PROMPT))
        await asyncio.sleep(0.02)
        return await collected()

    await until(arrived_again)
    vllm.close()
