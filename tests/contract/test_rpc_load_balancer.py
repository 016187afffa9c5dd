"""Load balancing, and the count of calls in flight, which ends with the call however that ends."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dynamo import context
from dynamo.errors import DynamoError, OverloadedError, RemoteError, WorkerLostError
from dynamo.rpc.client import Client
from dynamo.rpc.runtime import Runtime
from tests.contract.rpc_steps import Make, call, collect, make, namespace, soon

__all__ = ["make", "namespace"]  # fixtures


class Worker:
    """One instance that answers with its id; `gate` blocks its calls."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.id = runtime, runtime.instance_id
        self.gate = asyncio.Event()
        self.gate.set()

    async def who(self, _: Any) -> int:
        await self.gate.wait()
        return self.id

    async def stream(self, what: str) -> AsyncIterator[int]:
        yield self.id
        if what == "fail":
            raise KeyError(what)
        await self.gate.wait()
        yield self.id

    async def refuse(self, _: Any) -> int:
        raise OverloadedError("full")


@pytest.fixture
async def workers(make: Make, namespace: str) -> list[Worker]:
    found = [Worker(await make()) for _ in range(2)]
    for worker in found:
        for method in (worker.who, worker.stream, worker.refuse):
            await worker.runtime.serve(namespace, "Worker", method.__name__, method)
    return found


class Clients:
    def __init__(self, who: Client, stream: Client, refuse: Client) -> None:
        self.who, self.stream, self.refuse = who, stream, refuse


@pytest.fixture
async def clients(make: Make, namespace: str, workers: list[Worker]) -> Clients:
    runtime = await make()
    found = [await runtime.client(namespace, "Worker", name) for name in ("who", "stream", "refuse")]
    for client in found:
        await client.wait_for_instances(2, timeout_s=5)
    return Clients(*found)


def nothing_runs(client: Client) -> bool:
    return set(client.in_flight().values()) == {0}


@pytest.mark.parametrize("choice", ["power_of_two", "least_loaded"])
async def test_a_slow_instance_gets_less(workers: list[Worker], clients: Clients, choice: str) -> None:
    """Unary calls, four at a time: those on the slow instance stay there, so that the others use another one."""
    slow, quick = workers
    slow.gate.clear()
    held: set[asyncio.Task[int]] = set()
    answers: collections.Counter[int] = collections.Counter()
    for _ in range(40):
        held |= {asyncio.create_task(_result(call(clients.who, None, choice, streaming=False)))}
        done, held = await asyncio.wait(held, timeout=0.05 if len(held) >= 4 else 0)
        answers.update(task.result() for task in done)
    await soon(lambda: clients.who.in_flight()[quick.id] == 0)
    assert 1 <= clients.who.in_flight()[slow.id] == len([task for task in held if not task.done()]) <= 4
    slow.gate.set()
    for task in held:
        answers[await task] += 1
    assert sum(answers.values()) == 40
    assert answers[slow.id] <= 8 < answers[quick.id]
    await soon(lambda: nothing_runs(clients.who))


async def _result(reply: Any) -> int:
    return int(await reply)


async def test_a_burst_is_spread_evenly(workers: list[Worker], clients: Clients) -> None:
    """Each choice counts immediately, before the instance has answered."""
    for worker in workers:
        worker.gate.clear()
    streams = [call(clients.stream, "", "least_loaded") for _ in range(10)]
    await soon(lambda: sum(clients.stream.in_flight().values()) == 10)
    assert clients.stream.in_flight() == {worker.id: 5 for worker in workers}
    for stream in streams:
        await stream.aclose()
    await soon(lambda: nothing_runs(clients.stream))


async def test_idle_instances_take_turns(workers: list[Worker], clients: Clients) -> None:
    turns = [await call(clients.who, None, "least_loaded", streaming=False) for _ in range(10)]
    assert collections.Counter(turns) == {worker.id: 5 for worker in workers}


async def test_all_endpoints_of_a_process_count_together(workers: list[Worker], clients: Clients) -> None:
    workers[0].gate.clear()
    async with contextlib.aclosing(call(clients.stream, "", workers[0].id)) as stream:
        await anext(stream)
        assert clients.who.in_flight() == {workers[0].id: 1, workers[1].id: 0}
        assert await call(clients.who, None, "least_loaded", streaming=False) == workers[1].id
    await soon(lambda: nothing_runs(clients.who))


async def test_a_call_counts_until_it_ends_in_any_way(workers: list[Worker], clients: Clients) -> None:
    for worker in workers:
        worker.gate.clear()
    # the endpoint raises, after an item and before one
    with pytest.raises(KeyError):
        await collect(call(clients.stream, "fail", "least_loaded"))
    with pytest.raises(OverloadedError):
        await call(clients.refuse, None, "least_loaded", streaming=False)
    assert nothing_runs(clients.stream)
    # the consumer cancels: before the call is open, before the first item, after it
    early = call(clients.stream, "", "power_of_two")
    await early.aclose()
    waiting = asyncio.create_task(_result(call(clients.who, None, "least_loaded", streaming=False)))
    await soon(lambda: not nothing_runs(clients.who))
    waiting.cancel()
    running = call(clients.stream, "", "least_loaded")
    await anext(running)
    await running.aclose()
    await soon(lambda: nothing_runs(clients.who))
    # its deadline passes
    restore = context.deadline.set(context.after(0.2))
    with pytest.raises(DynamoError):
        await call(clients.who, None, "power_of_two", streaming=False)
    context.deadline.reset(restore)
    await soon(lambda: nothing_runs(clients.who))
    # an item that cannot be decoded
    with pytest.raises((RemoteError, ValueError, TypeError)):
        await clients.stream.call("", "least_loaded", decode=_refuse_to_decode, streaming=True).__anext__()
    await soon(lambda: nothing_runs(clients.who))


def _refuse_to_decode(_: Any) -> Any:
    raise ValueError("no")


async def test_a_lost_instance_has_no_calls_in_flight(workers: list[Worker], clients: Clients) -> None:
    lost, other = workers
    for worker in workers:
        worker.gate.clear()
    streams = [call(clients.stream, "", "least_loaded") for _ in range(6)]
    for stream in streams:
        await anext(stream)
    for connection in list(lost.runtime.listener.accepted):
        connection.abort()
    await soon(lambda: clients.stream.in_flight().get(lost.id, 0) == 0)
    await soon(lambda: set(clients.stream.instance_ids()) == {lost.id, other.id})  # connected again
    assert clients.stream.in_flight() == {lost.id: 0, other.id: 3}
    for worker in workers:
        worker.gate.set()
    ends = await asyncio.gather(*map(collect, streams), return_exceptions=True)
    assert sorted(map(str, map(type, ends))) == sorted(map(str, [WorkerLostError] * 3 + [list] * 3))
    await soon(lambda: nothing_runs(clients.stream))


async def test_kill_9_of_a_worker(
    make: Make, namespace: str, nats_server: str, etcd_server: str, tmp_path: Path
) -> None:
    argv = [sys.executable, "-m", "tests.contract.rpc_worker", nats_server, etcd_server, namespace, str(tmp_path)]
    processes = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(2)]  # noqa: ASYNC220
    try:
        client = await (await make()).client(namespace, "Worker", "generate")
        await client.wait_for_instances(2, timeout_s=30)
        streams = [call(client, 0.01, "least_loaded") for _ in range(4)]
        for stream in streams:
            await anext(stream)
        assert sorted(client.in_flight().values()) == [2, 2]
        processes[0].kill()
        await soon(lambda: len(client.in_flight()) == 1)
        assert list(client.in_flight().values()) == [2]
        assert await anext(call(client, 0.01, "least_loaded")) == 0  # cancelled immediately
        for stream in streams:
            stream.cancel()
        await soon(lambda: nothing_runs(client))
    finally:
        for process in processes:
            process.kill()
            process.communicate()
