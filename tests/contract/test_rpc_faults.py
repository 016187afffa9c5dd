"""Faults that the runtime survives: killed processes, lost connections, outages of NATS and etcd."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dynamo import codec
from dynamo.errors import ConfigError, NoInstancesError, TransportError, UnavailableError, WorkerLostError
from dynamo.launcher.embedded_servers import Infra
from dynamo.rpc import client as clients
from dynamo.rpc import server_connection as listeners
from dynamo.rpc.client import REQUEST_PLANE, Client
from dynamo.rpc.client_connection import ClientConnection, connect
from dynamo.rpc.messages import Request
from dynamo.rpc.runtime import Runtime
from dynamo.rpc.server_connection import ServerConnection
from dynamo.streams import Channel, Stream
from dynamo.transport.etcd import Etcd
from tests.contract.rpc_steps import Make, call, collect, decode_any, make, namespace, plane, soon

__all__ = ["make", "namespace", "plane"]  # fixtures


async def count(n: int) -> AsyncIterator[int]:
    for i in range(n):
        yield i


async def one_endpoint(make: Make, namespace: str, method: Any) -> tuple[Runtime, Client]:
    server, caller = await make(), await make()
    await server.serve(namespace, "Worker", "run", method)
    client = await caller.client(namespace, "Worker", "run")
    await client.wait_for_instances(timeout_s=5)
    return server, client


# -- processes that die


class Workers:
    """Real processes that serve `generate` and `pid`."""

    def __init__(self, nats: str, etcd: str, namespace: str, run_dir: Path) -> None:
        self._arguments = [nats, etcd, namespace, str(run_dir)]
        self.processes: dict[int, subprocess.Popen[str]] = {}

    async def start(self) -> int:
        argv = [sys.executable, "-m", "tests.contract.rpc_worker", *self._arguments]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
        assert process.stdout is not None
        instance = int(await asyncio.to_thread(process.stdout.readline))
        self.processes[instance] = process
        return instance

    def kill(self, instance: int) -> None:
        self.processes[instance].kill()
        self.processes[instance].wait()

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture
def workers(nats_server: str, etcd_server: str, namespace: str, tmp_path: Path) -> Any:
    workers = Workers(nats_server, etcd_server, namespace, tmp_path)
    yield workers
    workers.close()


async def test_kill_9_of_one_of_two_workers(workers: Workers, make: Make, namespace: str) -> None:
    first, second = await asyncio.gather(workers.start(), workers.start())
    caller = await make()
    client = await caller.client(namespace, "Worker", "generate")
    pids = await caller.client(namespace, "Worker", "pid")
    await client.wait_for_instances(2, timeout_s=5)
    await pids.wait_for_instances(2, timeout_s=5)
    assert {await call(pids, None, i, streaming=False) for i in (first, second)} == {
        process.pid for process in workers.processes.values()
    }
    doomed, other = call(client, 0.005, first), call(client, 0.005, second)
    assert await anext(doomed) == await anext(other) == 0
    killed = time.monotonic()
    os.kill(workers.processes[first].pid, signal.SIGKILL)
    with pytest.raises(WorkerLostError):
        await collect(doomed)
    assert time.monotonic() - killed < 1.0
    # its lease is valid for seconds: clients must not wait for its end
    started = time.monotonic()
    assert [await anext(call(client, 0.005)) for _ in range(6)] == [0] * 6
    assert time.monotonic() - started < 1.0
    assert client.instance_ids() == [second]
    with pytest.raises(NoInstancesError):
        await call(client, 0.005, first)
    assert await anext(other) == 1
    workers.kill(second)
    third = await workers.start()
    await soon(lambda: client.instance_ids() == [third], 5)
    assert await anext(call(client, 0.005)) == 0


async def test_killed_while_a_call_is_being_opened(workers: Workers, make: Make, namespace: str, plane: str) -> None:
    """After SIGSTOP it accepts bytes and does not answer; when it is killed, its clients use another one immediately."""
    first, second = await asyncio.gather(workers.start(), workers.start())
    caller = await make()
    client = await caller.client(namespace, "Worker", "pid")
    await client.wait_for_instances(2, timeout_s=5)
    workers.processes[first].send_signal(signal.SIGSTOP)
    replies = [call(client, None, streaming=False) for _ in range(4)]
    await asyncio.sleep(0.1)
    started = time.monotonic()
    workers.kill(first)
    async with asyncio.timeout(5):
        assert [await reply for reply in replies] == [workers.processes[second].pid] * 4
    assert time.monotonic() - started < 1.0
    workers.processes[second].send_signal(signal.SIGSTOP)
    reply = call(client, None, streaming=False)
    await asyncio.sleep(0.1)
    workers.kill(second)
    with pytest.raises(WorkerLostError):  # not NoInstancesError, which says less
        await reply


async def test_a_stopped_worker_is_skipped(
    workers: Workers, make: Make, namespace: str, plane: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "ACK_TIMEOUT_S", 0.1)
    first, second = await asyncio.gather(workers.start(), workers.start())
    client = await (await make()).client(namespace, "Worker", "pid")
    await client.wait_for_instances(2, timeout_s=5)
    workers.processes[first].send_signal(signal.SIGSTOP)
    started = time.monotonic()
    for _ in range(4):
        assert await call(client, None, streaming=False) == workers.processes[second].pid
    assert time.monotonic() - started < 1


# -- connections that break at the wrong moment


async def test_connection_lost_between_acceptance_and_first_item(make: Make, namespace: str) -> None:
    server, client = await one_endpoint(make, namespace, lambda _: Stream(Channel()))
    stream = await call(client, None)
    for connection in list(server.listener.accepted):
        connection.abort()
    with pytest.raises(WorkerLostError):
        await anext(stream)
    await client.wait_for_instances(timeout_s=2)  # it connects again
    await soon(lambda: server.server.active == 0)


async def test_connection_lost_before_acceptance_is_retried(
    make: Make, namespace: str, plane: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = await one_endpoint(make, namespace, count)
    open_stream = ServerConnection.open_stream
    lost = 0

    def lose_first(self: ServerConnection, sid: int) -> Any:
        nonlocal lost
        lost += 1
        if lost == 1:
            self.abort()
        return open_stream(self, sid)

    monkeypatch.setattr(ServerConnection, "open_stream", lose_first)
    assert await collect(call(client, 3)) == [0, 1, 2]
    assert lost == 2
    assert server.server.active == 0


async def test_request_of_an_earlier_connection_does_not_answer_on_the_next(
    make: Make, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listeners, "HELLO_TIMEOUT_S", 0.3)
    monkeypatch.setenv(REQUEST_PLANE, "nats")
    ran: list[int] = []

    async def run(n: int) -> AsyncIterator[int]:
        ran.append(n)
        yield n

    server, client = await one_endpoint(make, namespace, run)
    pooled = client._ready[0][1]
    assert pooled.connection is not None
    old = pooled.connection.id
    pooled.connection.abort()
    await soon(lambda: pooled.connection is not None and pooled.connection.id != old)
    await client.wait_for_instances(timeout_s=2)
    stale = Request(id="", connection=old, sid=1, timeout_s=None, body=msgspec.Raw(codec.encode(99)))
    subject = next(iter(server.server.endpoints))
    late = asyncio.create_task(client._nats.request(subject, codec.encode(stale), 5))
    assert await collect(call(client, 1)) == [1]
    assert b"did not arrive" in await late
    assert ran == [1]


async def test_lost_acceptance_never_mixes_two_attempts(
    make: Make, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The items come over the RPC connection, NATS loses the acceptance: the call must not run elsewhere too."""
    monkeypatch.setenv(REQUEST_PLANE, "nats")
    monkeypatch.setattr(clients, "ACK_TIMEOUT_S", 0.1)
    ran = 0

    async def run(n: int) -> AsyncIterator[int]:
        nonlocal ran
        ran += 1
        for i in range(n):
            yield i
            await asyncio.sleep(0.02)

    _, client = await one_endpoint(make, namespace, run)

    client._nats._inbox = "no.subscriber.here"
    assert await collect(call(client, 15)) == list(range(15))
    assert ran == 1


async def test_leaving_while_calls_run_and_open(make: Make, namespace: str) -> None:
    server, client = await one_endpoint(make, namespace, count)
    running = [call(client, 200) for _ in range(20)]
    first = [await anext(stream) for stream in running[:10]]
    await server.deregister()
    await soon(lambda: not client._instances)
    rest = await asyncio.gather(*(collect(stream) for stream in running))
    assert [len(items) for items in rest] == [199] * 10 + [200] * 10
    assert first == [0] * 10
    await soon(lambda: not server.listener.accepted)


# -- who may send requests over an RPC connection


async def raw_connection(server: Runtime, key: str) -> ClientConnection:
    return await connect(server.listener.addresses, key, same_host=True, on_lost=lambda _: None, on_bye=lambda: None)


async def test_the_key_is_needed_to_call(make: Make, namespace: str, caplog: pytest.LogCaptureFixture) -> None:
    """Discovery publishes it: reaching the port is not enough to run anything."""
    ran: list[Any] = []
    server, client = await one_endpoint(make, namespace, ran.append)
    stranger = await raw_connection(server, "0" * 32)
    stream = stranger.open_stream(decode_any, Channel())
    request = Request("", stranger.id, stream.sid, None, msgspec.Raw(codec.encode(1)))
    with pytest.raises(WorkerLostError):
        await stranger.request(stream, next(iter(server.server.endpoints)), request, 5)
    assert not ran
    assert "HELLO without the key of this process" in caplog.text
    assert client.instance_ids() == [server.instance_id]  # other connections are kept


async def test_a_request_for_an_unknown_endpoint_is_refused(make: Make, namespace: str) -> None:
    server, _ = await one_endpoint(make, namespace, count)
    connection = await raw_connection(server, server.listener.key)
    stream = connection.open_stream(decode_any, Channel())
    request = Request("", connection.id, stream.sid, None, msgspec.Raw(codec.encode(1)))
    with pytest.raises(UnavailableError, match=r"a\.b-c is not served here"):
        await connection.request(stream, "a.b-c", request, 5)
    assert not connection.streams
    connection.abort()


def test_an_unknown_request_plane_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUEST_PLANE, "udp")
    with pytest.raises(ConfigError, match="DYN_REQUEST_PLANE=udp") as caught:
        Runtime()
    assert "nats" in caught.value.hint


# -- NATS and etcd


@pytest.fixture
async def own(private_infra: Infra, tmp_path: Path) -> AsyncIterator[Any]:
    """A serving and a calling runtime on servers of their own."""
    run_dir = tmp_path / "r"
    run_dir.mkdir()
    made = [
        Runtime(
            nats_url=private_infra.nats_url, etcd_endpoints=private_infra.etcd_endpoints, run_dir=run_dir, name=name
        )
        for name in ("callee", "caller")
    ]
    yield made
    await asyncio.gather(*(runtime.close() for runtime in made))


async def test_nats_outage(private_infra: Infra, plane: str, own: list[Runtime], namespace: str) -> None:
    server, caller = own
    go = asyncio.Event()

    async def slow(n: int) -> AsyncIterator[int]:
        yield n
        await go.wait()
        yield n + 1

    await server.serve(namespace, "Worker", "slow", slow)
    await server.serve(namespace, "Worker", "run", count)
    client, slow_client = (
        await caller.client(namespace, "Worker", "run"),
        await caller.client(namespace, "Worker", "slow"),
    )
    await client.wait_for_instances(timeout_s=5)
    await slow_client.wait_for_instances(timeout_s=5)
    in_flight = call(slow_client, 1)
    assert await anext(in_flight) == 1
    await private_infra.embedded["nats"].stop()
    for attempt in range(2):
        if plane == "tcp":
            assert await collect(call(client, 3)) == [0, 1, 2]
            continue
        started = time.monotonic()
        with pytest.raises((TransportError, UnavailableError)) as caught:
            await call(client, 3)
        assert caught.value.status == 503
        assert time.monotonic() - started < 1.3, attempt
    go.set()
    assert await collect(in_flight) == [2]
    waiting = asyncio.create_task(collect(call(client, 3)))
    await private_infra.restart_nats()
    assert await waiting == [0, 1, 2]
    assert await collect(call(client, 3, server.instance_id)) == [0, 1, 2]


async def test_a_static_endpoint_needs_nats_for_discovery_only(private_infra: Infra, namespace: str) -> None:
    server, caller = (Runtime(is_static=True, nats_url=private_infra.nats_url) for _ in range(2))
    try:
        await server.serve(namespace, "Worker", "run", count)
        client = await caller.client(namespace, "Worker", "run")
        await client.wait_for_instances(timeout_s=5)
        await private_infra.embedded["nats"].stop()
        for _ in range(5):
            assert await collect(call(client, 3)) == [0, 1, 2]
            await asyncio.sleep(0.5)
        await private_infra.restart_nats()
        await server.close()
        await soon(lambda: not client.instance_ids())
        server = Runtime(is_static=True, nats_url=private_infra.nats_url)
        await server.serve(namespace, "Worker", "run", count)
        assert await client.wait_for_instances(timeout_s=5) == [server.instance_id]
    finally:
        await asyncio.gather(server.close(), caller.close())


async def test_nats_restarts_under_load(private_infra: Infra, plane: str, own: list[Runtime], namespace: str) -> None:
    server, caller = own
    await server.serve(namespace, "Worker", "run", count)
    client = await caller.client(namespace, "Worker", "run")
    await client.wait_for_instances(timeout_s=5)
    outcomes: list[int] = []
    stop = asyncio.Event()

    async def load() -> None:
        while not stop.is_set():
            try:
                assert await collect(call(client, 5)) == list(range(5))
                outcomes.append(200)
            except (TransportError, UnavailableError) as error:
                outcomes.append(error.status)
                await asyncio.sleep(0.01)

    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(load())
        await asyncio.sleep(0.2)
        await private_infra.restart_nats()
        await asyncio.sleep(0.7)
        before = len(outcomes)
        await asyncio.sleep(0.3)
        stop.set()
    assert set(outcomes[0 if plane == "tcp" else before :]) == {200}
    assert server.server.active == 0


@pytest.mark.parametrize("wipe", [False, True])
async def test_etcd_restarts(
    private_infra: Infra, own: list[Runtime], namespace: str, wipe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, caller = own
    await server.serve(namespace, "Worker", "run", count)
    client = await caller.client(namespace, "Worker", "run")
    await client.wait_for_instances(timeout_s=5)
    instance = server.instance_id
    await private_infra.embedded["etcd"].stop()
    assert await collect(call(client, 2)) == [0, 1]
    late = await caller.client(namespace, "Worker", "late")  # requested while etcd is down
    await private_infra.restart_etcd(wipe=wipe)
    assert await collect(call(client, 2)) == [0, 1]
    assert client.instance_ids() == [instance]
    async with Etcd.connect(private_infra.etcd_endpoints) as etcd, asyncio.timeout(8):
        while not (found := (await etcd.get_prefix(f"instances/{namespace}/Worker/run:"))[0]):
            await asyncio.sleep(0.05)
    assert found[0].key.endswith(f":{instance:x}")
    await server.serve(namespace, "Worker", "late", count)
    assert await late.wait_for_instances(timeout_s=8) == [instance]
    assert await collect(call(client, 2)) == [0, 1]
