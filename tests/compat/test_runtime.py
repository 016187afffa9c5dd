"""The runtime of 0.x by hand: etcd's keys and caches, queues, tokens, in scripts and in services."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import nats
import pytest

from dynamo import _core
from dynamo.errors import TransportError
from dynamo.launcher.embedded_servers import Infra
from dynamo.runtime import Annotated, DistributedRuntime, EtcdClient, EtcdKvCache, NatsQueue, dynamo_worker
from dynamo.transport.etcd import Etcd
from tests.served import Start, until


@pytest.fixture
def root() -> str:
    """A prefix that no other test uses."""
    return f"compat/{uuid.uuid4().hex}/"


@asynccontextmanager
async def runtime_at(infra: Infra, **options: Any) -> AsyncIterator[DistributedRuntime]:
    runtime = DistributedRuntime(
        asyncio.get_running_loop(), nats_url=infra.nats_url, etcd_endpoints=infra.etcd_endpoints, **options
    )
    try:
        yield runtime
    finally:
        await runtime.close()


@pytest.fixture
async def runtime(infra: Infra) -> AsyncIterator[DistributedRuntime]:
    async with runtime_at(infra) as runtime:
        yield runtime


async def eventually(read: Callable[[], Awaitable[Any]], expected: Any) -> None:
    async with asyncio.timeout(10):
        while await read() != expected:
            await asyncio.sleep(0.01)


# -- etcd


async def test_etcd_client(infra: Infra, runtime: DistributedRuntime, root: str) -> None:
    etcd = runtime.etcd_client()
    assert etcd is not None
    mine = etcd.primary_lease_id()
    assert mine == runtime.namespace("n").component("c").endpoint("e").lease_id()
    assert await etcd.kv_create(root + "a", b"1") is None
    with pytest.raises(Exception, match="failed to create key"):
        await etcd.kv_create(root + "a", b"1")
    await etcd.kv_create_or_validate(root + "a", b"1", mine)
    await etcd.kv_create_or_validate(root + "b", b"\xff")
    with pytest.raises(Exception, match="failed to create or validate key"):
        await etcd.kv_create_or_validate(root + "b", b"2")
    await etcd.kv_put(root + "b", b"2", None)
    await etcd.kv_put(root + "free", b"3", 0)
    found = await etcd.kv_get_prefix(root)
    assert [(item["key"], item["value"], item["lease"]) for item in found] == [
        (root + "a", b"1", mine), (root + "b", b"2", mine), (root + "free", b"3", 0)
    ]  # fmt: skip
    assert [item["version"] for item in found] == [1, 2, 1]
    assert found[1]["create_revision"] < found[1]["mod_revision"] < found[2]["mod_revision"]
    assert await etcd.kv_get_prefix(root + "none") == []
    await runtime.close()
    async with Etcd.connect(infra.etcd_endpoints) as other:
        assert [item.key for item in (await other.get_prefix(root))[0]] == [root + "free"]


async def test_keys_come_back_after_etcd_was_wiped(private_infra: Infra) -> None:
    async with runtime_at(private_infra) as runtime:
        etcd = runtime.etcd_client()
        assert etcd is not None
        await etcd.kv_put("k/put", b"1")
        await etcd.kv_create("k/created", b"2")
        await private_infra.restart_etcd(wipe=True)

        async def keys() -> list[str]:
            return [item["key"] for item in await etcd.kv_get_prefix("k/")]

        await eventually(keys, ["k/created", "k/put"])


async def test_a_revoked_lease_ends_its_runtime(infra: Infra, runtime: DistributedRuntime, root: str) -> None:
    async with runtime_at(infra) as other:

        async def handler(request: Any) -> AsyncIterator[Any]:
            yield request

        component = other.namespace(root.replace("/", "-")).component("worker")
        lease = await component.create_service_with_custom_lease(ttl=1)
        serving = asyncio.create_task(component.endpoint("generate").serve_endpoint(handler, lease))
        client = await runtime.namespace(root.replace("/", "-")).component("worker").endpoint("generate").client()
        assert await asyncio.wait_for(client.wait_for_instances(), 10) == [lease.id()]
        assert await lease.is_valid()
        async with runtime_at(infra) as third:  # whose client knows the instance at once
            client_3 = await third.namespace(root.replace("/", "-")).component("worker").endpoint("generate").client()
            assert client_3.instance_ids() == [lease.id()]
        etcd = runtime.etcd_client()
        assert etcd is not None
        await etcd.revoke_lease(lease.id())
        await asyncio.wait_for(serving, 10)
        assert not await lease.is_valid()
        assert client.instance_ids() == []


async def test_a_static_runtime_has_no_etcd(infra: Infra) -> None:
    async with runtime_at(infra, is_static=True) as runtime:
        assert runtime.etcd_client() is None


async def test_cache(infra: Infra, runtime: DistributedRuntime, root: str) -> None:
    async with runtime_at(infra) as second:
        etcd, etcd_2 = runtime.etcd_client(), second.etcd_client()
        assert etcd is not None
        assert etcd_2 is not None
        cache = await EtcdKvCache.create(etcd, root, {"length": "1000", "size": b"2"})
        cache_2 = await EtcdKvCache.new(etcd_2, root, {"length": "5", "more": "3"})
        assert await cache_2.get_all() == {"length": b"1000", "size": b"2", "more": b"3"}
        assert int(await cache_2.get("length") or 0) == 1000
        assert await cache_2.get("none") is None
        await eventually(lambda: cache.get("more"), b"3")
        await cache.put("length", b"7")
        assert await cache.get("length") == b"7"
        await eventually(lambda: cache_2.get("length"), b"7")
        await etcd_2.kv_put(root + "length", b"8")
        await eventually(lambda: cache.get("length"), b"8")
        await cache_2.delete("size")
        assert await cache_2.get("size") is None
        await eventually(lambda: cache.get("size"), None)
        await cache.clear_all()
        assert await cache.get_all() == {}
        await eventually(cache_2.get_all, {})
        assert await etcd.kv_get_prefix(root) == []


async def test_a_cache_keeps_the_last_of_two_changes_at_once(runtime: DistributedRuntime, root: str) -> None:
    class Slow(EtcdClient):
        """Returns from a call when another change of the key has been seen already."""

        async def kv_put(self, key: str, value: bytes, lease_id: int | None = None) -> None:
            await super().kv_put(key, value, lease_id)
            await super().kv_put(key, b"later", lease_id)
            await eventually(lambda: cache.get("k"), b"later")

        async def delete(self, key: str) -> None:
            await super().delete(key)
            await super().kv_put(key, b"again")
            await eventually(lambda: cache.get("k"), b"again")

    cache = await EtcdKvCache.create(Slow(runtime.inner), root, {"k": b"0"})
    await cache.put("k", b"1")
    assert await cache.get("k") == b"later"
    await cache.delete("k")
    assert await cache.get("k") == b"again"


# -- queues


@pytest.fixture
async def queues(infra: Infra, root: str) -> AsyncIterator[Callable[[], NatsQueue]]:
    """Make users of one queue."""
    async with AsyncExitStack() as made:

        def queue() -> NatsQueue:
            user = NatsQueue(f"{root}prefill_queue", infra.nats_url, 0.2)
            made.push_async_callback(user.close)
            return user

        yield queue


async def test_queue(queues: Callable[[], NatsQueue]) -> None:
    producer, worker, idle = queues(), queues(), queues()
    await producer.connect()
    await producer.ensure_connection()
    assert await worker.dequeue_task() is None
    for number in range(4):
        await producer.enqueue_task(str(number).encode())
    assert await producer.get_queue_size() == 4
    assert await worker.dequeue_task() == b"0"
    assert await idle.dequeue_task(0.5) == b"1"  # which then takes no more, and holds none either
    assert [await worker.dequeue_task(5), await worker.dequeue_task(5)] == [b"2", b"3"]
    assert await producer.get_queue_size() == 0
    waiting = asyncio.create_task(worker.dequeue_task(20))
    await asyncio.sleep(0.1)
    await producer.enqueue_task(b"4")
    assert await asyncio.wait_for(waiting, 10) == b"4"
    waiting = asyncio.create_task(worker.dequeue_task(20))
    await asyncio.sleep(0.1)
    await worker.close()
    assert await asyncio.wait_for(waiting, 10) is None
    await producer.enqueue_task(b"5")
    assert await worker.dequeue_task(5) == b"5"
    assert await worker.dequeue_task(0) is None


async def test_each_task_goes_to_one_worker(queues: Callable[[], NatsQueue]) -> None:
    async def work(worker: NatsQueue) -> None:
        while len(done) < len(tasks):
            if (task := await worker.dequeue_task(1)) is not None:
                done.append(task)

    producer = queues()
    tasks = [str(number).encode() for number in range(40)]
    for task in tasks:
        await producer.enqueue_task(task)
    done: list[bytes] = []
    async with asyncio.timeout(20):  # a task that a worker took and lost comes back after 30 s
        await asyncio.gather(*(work(queues()) for _ in range(3)))
    assert sorted(done) == sorted(tasks)


async def test_a_queue_shares_the_stream_of_another_client(
    infra: Infra, queues: Callable[[], NatsQueue], root: str
) -> None:
    """The llm example of 0.2.0 had a queue of its own, on nats-py, in a stream with limits of its own."""
    stream = f"{root}prefill_queue".replace("/", "_")
    client = await nats.connect(infra.nats_url)
    try:
        jetstream = client.jetstream()
        await jetstream.add_stream(name=stream, subjects=[f"{stream}.*"], max_msgs=1000)
        theirs = await jetstream.pull_subscribe(f"{stream}.queue", durable="worker-group")
        queue = queues()
        await queue.enqueue_task(b"1")
        (message,) = await theirs.fetch(1, timeout=5)
        assert message.data == b"1"
        await message.ack()
        await jetstream.publish(f"{stream}.queue", b"2")
        assert await queue.dequeue_task(5) == b"2"
        assert (await jetstream.stream_info(stream)).config.max_msgs == 1000
    finally:
        await client.close()


async def test_a_queue_without_a_server_says_so() -> None:
    queue = NatsQueue("q", "nats://127.0.0.1:1", 1)
    with pytest.raises(TransportError, match=r"cannot connect to NATS at nats://127\.0\.0\.1:1: "):
        await queue.enqueue_task(b"1")


# -- runtime


async def test_main_gets_a_connected_runtime(infra: Infra, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in infra.env.items():
        monkeypatch.setenv(name, value)

    @dynamo_worker()
    async def main(runtime: DistributedRuntime) -> None:
        assert runtime.event_loop() is asyncio.get_running_loop()
        etcd = runtime.etcd_client()
        assert etcd is not None
        async with Etcd.connect(infra.etcd_endpoints) as other:  # which uses the lease of this process
            await other.put("compat/by-lease", b"", etcd.primary_lease_id())

    await main()
    async with Etcd.connect(infra.etcd_endpoints) as other:
        assert await other.get("compat/by-lease") is None


async def test_tokens(runtime: DistributedRuntime) -> None:
    first, second = runtime.child_token(), runtime.child_token()
    first.cancel()
    await asyncio.wait_for(first.cancelled(), 5)
    waiting = asyncio.create_task(second.cancelled())
    await asyncio.sleep(0)
    assert not waiting.done()
    runtime.primary_token().cancel()
    await asyncio.wait_for(waiting, 5)
    assert runtime.inner.is_stopped


def test_names_of_the_binding() -> None:
    assert _core.DistributedRuntime is DistributedRuntime
    assert _core.NatsQueue is NatsQueue
    with pytest.raises(AttributeError, match=r"module 'dynamo._core' has no attribute 'Nonsense'"):
        _core.Nonsense  # noqa: B018


def test_an_item_shows_all_its_fields() -> None:
    assert repr(Annotated("h")) == "Annotated(data='h', event=None, comment=[], id=None)"


def test_log_message(caplog: pytest.LogCaptureFixture) -> None:
    _core.log_message("warning", "100 % full", "module.function", "file.py", 12)
    (record,) = caplog.records
    assert (record.name, record.levelname, record.lineno) == ("module.function", "WARNING", 12)
    assert record.getMessage() == "100 % full"


# -- in services


def test_a_graph_that_uses_it(era: Start) -> None:
    served = era("runtime_03").ready()

    def generate() -> dict[str, Any]:
        response = httpx.post(f"{served.url}/generate", json={"text": "hello"}, timeout=20)
        return response.json() if response.status_code == 200 else {}

    (worker,) = httpx.post(f"{served.url}/workers").json()
    assert generate() == {"text": "hello!", "metadata": str(worker)}
    httpx.post(f"{served.url}/set_suffix", json={"text": "?"})
    assert generate()["text"] == "hello?"
    # it handles signals itself: shutting the runtime down ends the process, and another one takes its place
    (pid,) = served.pids("--service-name Worker")
    os.kill(pid, signal.SIGTERM)
    until(lambda: served.pids("--service-name Worker") not in ([], [pid]), "a new worker")
    until(lambda: httpx.post(f"{served.url}/workers").json() not in ([], [worker]), "a new instance")
    (worker,) = httpx.post(f"{served.url}/workers").json()
    assert generate() == {"text": "hello?", "metadata": str(worker)}
    assert "worker shuts its runtime down" in served.output
    assert served.stop() == 0
