"""Work queues on real JetStream: each task is done by one worker, through faults of workers and of the server."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Protocol

import msgspec
import pytest

from dynamo.errors import OverloadedError, TransportError
from dynamo.launcher.embedded_servers import Infra
from dynamo.launcher.server_kinds import NATS, find_binary
from dynamo.rpc.runtime import Runtime
from dynamo.sdk import Job, Service, WorkQueue, bind, depends, endpoint, service
from dynamo.sdk.channels import attach
from dynamo.sdk.depends import Stub
from dynamo.sdk.spec import spec_of
from dynamo.transport import pull_subscription
from dynamo.transport.nats import Nats
from dynamo.worker.broker import ServiceBroker, delete_queues, streams
from dynamo.worker.stubs import InstancePool
from tests.contract.rpc_steps import Make, make, namespace, soon
from tests.ports import free_port

__all__ = ["make", "namespace"]  # fixtures


class Task(msgspec.Struct):
    number: int
    data: bytes = b""


@service
class Worker(Service):
    tasks = WorkQueue(Task, lost_after_s=2.0)
    few = WorkQueue(Task, max_tasks=3)
    short = WorkQueue(Task, max_age_s=1.0)
    patient = WorkQueue(Task, lost_after_s=60.0)

    @endpoint
    async def run(self, request: int) -> int:
        return request


@service
class Front(Service):
    worker = depends(Worker)


def worker_on(runtime: Runtime, namespace: str) -> Worker:
    worker = Worker()
    attach(worker, ServiceBroker(runtime, namespace, "Worker"))
    return worker


def front_on(runtime: Runtime, namespace: str) -> Front:
    front = Front()
    bind(front, worker=Stub(spec_of(Worker), InstancePool(runtime, Worker, namespace)))
    return front


async def work(worker: Worker, finished: Counter[int], limit: int = 4) -> None:
    async for job in worker.tasks.take(limit):
        async with job:
            await asyncio.sleep(0)
        finished[job.task.number] += 1


async def first(worker: Worker, limit: int = 1) -> Job[Task]:
    async with asyncio.timeout(20), aclosing(worker.tasks.take(limit)) as jobs:
        return await anext(jobs)


class Tasked(Protocol):
    def __call__(self, work: Any) -> asyncio.Task[Any]: ...


@pytest.fixture
async def spawn() -> AsyncIterator[Tasked]:
    tasks: list[asyncio.Task[Any]] = []

    def spawn(work: Any) -> asyncio.Task[Any]:
        tasks.append(asyncio.get_running_loop().create_task(work))
        return tasks[-1]

    yield spawn
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_each_task_is_done_once_by_some_worker(make: Make, namespace: str, spawn: Tasked) -> None:
    a, b, c = await make(), await make(), await make()
    front = front_on(a, namespace)
    assert await front.worker.tasks.size() == 0
    finished: list[Counter[int]] = [Counter(), Counter()]
    for runtime, mine in zip((b, c), finished, strict=True):
        spawn(work(worker_on(runtime, namespace), mine))
    await asyncio.gather(*(front.worker.tasks.put(Task(number)) for number in range(200)))
    await soon(lambda: sum((finished[0] + finished[1]).values()) >= 200, 20)
    assert finished[0] + finished[1] == Counter(range(200))
    assert all(finished)
    await asyncio.sleep(0.2)
    assert await front.worker.tasks.size() == 0


async def test_tasks_wait_for_workers_in_order_and_count(make: Make, namespace: str) -> None:
    a, b = await make(), await make()
    front, worker = front_on(a, namespace), worker_on(b, namespace)
    for number in range(5):
        await front.worker.tasks.put(Task(number, b"payload"))
        assert await front.worker.tasks.size() >= number + 1  # its own tasks are counted immediately
    await asyncio.sleep(0.2)
    assert await worker.tasks.size() == 5
    async with aclosing(worker.tasks.take(limit=2)) as jobs:
        held = [await anext(jobs), await anext(jobs)]
        assert [(job.task, job.tries) for job in held] == [(Task(0, b"payload"), 1), (Task(1, b"payload"), 1)]
        await asyncio.sleep(0.2)
        assert await worker.tasks.size() == 5  # including those being worked on
        with pytest.raises(TimeoutError):  # a third task would exceed the limit
            await asyncio.wait_for(anext(jobs), 0.3)
    await held[0].done()
    await held[0].done()  # no-op
    await held[0].fail()
    await asyncio.sleep(0.2)
    assert await front.worker.tasks.size() == 4


async def test_each_finished_task_frees_a_place(make: Make, namespace: str) -> None:
    runtime = await make()
    worker = worker_on(runtime, namespace)
    for number in range(6):
        await worker.tasks.put(Task(number))
    seen = []
    async with asyncio.timeout(10), aclosing(worker.tasks.take(limit=1)) as jobs:
        async for job in jobs:
            seen.append(job.task.number)
            await (job.done() if job.task.number % 2 else job.drop("even"))
            if len(seen) == 6:
                break
    assert seen == list(range(6))
    await asyncio.sleep(0.2)
    assert await worker.tasks.size() == 0


async def test_failed_tasks_are_redelivered_and_then_dropped(
    make: Make, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = await make(), await make()
    worker, other = worker_on(a, namespace), worker_on(b, namespace)
    await worker.tasks.put(Task(1))
    job = await first(worker)
    await job.fail()
    job = await first(other)
    assert (job.task.number, job.tries) == (1, 2)
    with pytest.raises(KeyError):
        async with job:
            raise KeyError
    job = await first(worker)
    assert job.tries == 3
    assert "dropped" not in caplog.text
    await job.fail()
    assert f"task on namespace.{namespace}.component.Worker.tasks dropped: it failed 3 times" in caplog.text
    await asyncio.sleep(0.2)
    assert await worker.tasks.size() == 0


async def test_a_killed_worker_loses_nothing(
    make: Make, namespace: str, nats_server: str, etcd_server: str, spawn: Tasked
) -> None:
    """A process that holds three tasks is killed; another one does all tasks, those three at the second delivery."""
    runtime = await make()
    worker = worker_on(runtime, namespace)
    argv = [sys.executable, "-m", "tests.contract.queue_worker", nats_server, etcd_server, namespace, "3"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:  # noqa: ASYNC220
        try:
            for number in range(6):
                await worker.tasks.put(Task(number))
            assert process.stdout is not None
            taken = [int(await asyncio.to_thread(process.stdout.readline)) for _ in range(3)]
            assert taken == [0, 1, 2]
            finished: Counter[int] = Counter()
            spawn(work(worker, finished))
            await soon(lambda: len(finished) == 3)
            await asyncio.sleep(4)  # twice `lost_after_s`: while it lives, its tasks are not redelivered
            assert finished == Counter([3, 4, 5])
        finally:
            process.kill()
    await soon(lambda: len(finished) == 6, 10)
    assert finished == Counter(range(6))
    await asyncio.sleep(0.2)
    assert await worker.tasks.size() == 0


async def test_a_task_that_kills_its_workers_is_dropped(
    make: Make, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = await make()
    worker = worker_on(runtime, namespace)
    await worker.tasks.put(Task(1))
    for tries in (1, 2, 3):
        job = await first(worker)
        assert job.tries == tries
        del job  # as if the worker had died: the task is not extended any more
    async with aclosing(worker.tasks.take()) as jobs:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(jobs), 3)
    assert "dropped: 3 workers took it and were lost" in caplog.text
    assert await worker.tasks.size() == 0


async def test_a_stopping_worker_gives_back_unfinished_tasks(make: Make, namespace: str) -> None:
    a, b = await make(), await make()
    stopping, other = worker_on(a, namespace), worker_on(b, namespace)
    for number in range(3):
        await other.patient.put(Task(number))
    jobs = stopping.patient.take(limit=3)
    held = [await anext(jobs), await anext(jobs)]
    await a.drain(1)
    async with asyncio.timeout(2):
        assert [job async for job in jobs] == []  # `take` ends
    await held[0].done()  # tasks that are worked on may be finished
    await a.close()
    async with asyncio.timeout(20), aclosing(other.patient.take(limit=2)) as others:
        assert sorted([(await anext(others)).task.number, (await anext(others)).task.number]) == [1, 2]
    with pytest.raises(TransportError):
        await stopping.patient.put(Task(5))


async def test_a_worker_that_hung_may_still_finish(make: Make, namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its task was redelivered to another worker meanwhile; the first one to finish removes it."""

    async def extend(_: object) -> None: ...

    monkeypatch.setattr(pull_subscription.PullSubscription, "extend", extend)
    a, b = await make(), await make()
    hung, other = worker_on(a, namespace), worker_on(b, namespace)
    await hung.tasks.put(Task(1))
    old = await first(hung)
    new = await first(other)
    assert (old.tries, new.tries) == (1, 2)
    await old.done()
    await asyncio.sleep(0.2)
    assert await other.tasks.size() == 0
    await new.done()


async def test_a_full_queue_refuses(make: Make, namespace: str) -> None:
    runtime = await make()
    worker = worker_on(runtime, namespace)
    for number in range(3):
        await worker.few.put(Task(number))
    with pytest.raises(OverloadedError, match=r"few is full: 3 tasks"):
        await worker.few.put(Task(3))
    async with aclosing(worker.few.take()) as jobs:
        await (await anext(jobs)).done()
    await worker.few.put(Task(3))
    with pytest.raises(TransportError, match="bytes, the NATS server takes"):
        await worker.tasks.put(Task(1, bytes(runtime.nats.max_payload_bytes)))


async def test_old_tasks_expire(make: Make, namespace: str) -> None:
    runtime = await make()
    worker = worker_on(runtime, namespace)
    await worker.short.put(Task(1))
    assert await worker.short.size() == 1
    async with asyncio.timeout(20):
        while await worker.short.size():
            await asyncio.sleep(0.1)


async def test_other_limits_in_a_new_version(make: Make, namespace: str) -> None:
    a, b = await make(), await make()
    await worker_on(a, namespace).few.put(Task(1))

    class New(Worker):
        few = WorkQueue(Task, max_tasks=1)

    new = New()
    attach(new, ServiceBroker(b, namespace, "Worker"))
    with pytest.raises(OverloadedError):
        await new.few.put(Task(2))


async def test_tasks_that_do_not_fit_are_dropped(make: Make, namespace: str, caplog: pytest.LogCaptureFixture) -> None:
    runtime = await make()
    worker = worker_on(runtime, namespace)
    await worker.tasks.put("text")  # type: ignore[arg-type]
    await worker.tasks.put(Task(2))
    job = await first(worker)
    assert job.task.number == 2
    assert "dropped: invalid Task" in caplog.text


@pytest.mark.parametrize("wipe", [False, True])
async def test_nats_is_killed_and_restarted(
    private_infra: Infra,
    namespace: str,
    wipe: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    infra = private_infra
    if wipe:
        monkeypatch.setattr(pull_subscription, "ACK_TIMEOUT_S", 3.0)  # it fails in any case
    runtimes = [Runtime(nats_url=infra.nats_url, etcd_endpoints=infra.etcd_endpoints) for _ in range(2)]
    front, worker = front_on(runtimes[0], namespace), worker_on(runtimes[1], namespace)
    for number in range(20):
        await front.worker.tasks.put(Task(number))
    jobs = worker.tasks.take(limit=2)
    held = [await anext(jobs), await anext(jobs)]
    await asyncio.sleep(
        0.5
    )  # the server writes deliveries to disk a moment later, and confirms none that it has forgotten
    infra.processes["nats"].kill()
    await infra.processes["nats"].wait()
    with pytest.raises(TransportError):
        await front.worker.tasks.put(Task(100))
    if wipe:
        await infra._restart("nats", wipe=True)
        with pytest.raises(TransportError):
            await asyncio.gather(*(job.done() for job in held))
        await front.worker.tasks.put(Task(200))
        expected = [200]
    else:
        ending = asyncio.gather(*(job.done() for job in held))  # acknowledged as soon as the server is back
        await infra.restart_nats()
        await ending
        await runtimes[0].nats.wait_connected(10)
        await front.worker.tasks.put(Task(200))
        expected = [*range(2, 20), 200]
    seen: set[int] = set()
    async with asyncio.timeout(30):
        async for job in jobs:
            seen.add(job.task.number)
            await job.done()
            if seen >= set(expected):
                break
    await jobs.aclose()
    # at least once: a task or an acknowledgement that the server had not written when it was killed may be repeated
    assert seen <= {*expected, *(() if wipe else (0, 1, 100))}
    await asyncio.sleep(0.2)
    assert await front.worker.tasks.size() == 0
    assert ("was lost with its tasks" in caplog.text) == wipe
    for runtime in runtimes:
        await runtime.close()


async def test_a_server_without_jetstream(tmp_path: Any, namespace: str, etcd_server: str) -> None:
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        find_binary(NATS), "--addr", "127.0.0.1", "--port", str(port), stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        while b"Server is ready" not in await process.stderr.readline():
            pass
        runtime = Runtime(nats_url=f"nats://127.0.0.1:{port}", etcd_endpoints=etcd_server)
        worker = worker_on(runtime, namespace)
        for use in (worker.tasks.put(Task(1)), worker.tasks.size(), first(worker)):
            with pytest.raises(TransportError, match=r"has no JetStream(.|\n)*hint: start it as `nats-server -js`"):
                await use
        await runtime.close()
    finally:
        process.kill()
        await process.wait()


async def test_the_last_deployment_deletes_its_queues(make: Make, namespace: str, infra: Infra) -> None:
    runtime = await make()
    front = front_on(runtime, namespace)
    await front.worker.tasks.put(Task(1))
    services = [(namespace, Worker), (namespace, Front)]
    nats = await Nats.connect(infra.nats_url)
    try:

        async def exists() -> bool:
            (name,) = [name for name in streams(services) if name.endswith("_tasks")]
            answer = msgspec.json.decode(await nats.request(f"$JS.API.STREAM.INFO.{name}", b"", 2))
            return "error" not in answer

        elsewhere = await make()
        await elsewhere.serve(namespace, "Front", "run", lambda request: request)
        await delete_queues(services, infra.nats_url, infra.etcd_endpoints)
        assert await exists(), "another host serves the graph"
        await elsewhere.close()
        await delete_queues(services, infra.nats_url, infra.etcd_endpoints)
        assert not await exists()
        await delete_queues(services, infra.nats_url, infra.etcd_endpoints)  # nothing is left to delete
    finally:
        await nats.close()
