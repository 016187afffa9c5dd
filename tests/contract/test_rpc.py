"""Calls between runtimes over real NATS and etcd, on both request planes."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from dynamo import context, log
from dynamo.errors import (
    BadCallError,
    DeadlineError,
    DynamoError,
    NoInstancesError,
    OverloadedError,
    RemoteError,
    RequestError,
    TransportError,
    UnavailableError,
)
from dynamo.rpc import frames
from dynamo.rpc import server_connection as listeners
from dynamo.rpc.client import Client
from dynamo.rpc.runtime import Runtime
from dynamo.streams import Channel, Stream
from tests.contract.rpc_steps import Make, call, collect, make, namespace, plane, soon

__all__ = ["make", "namespace", "plane"]  # fixtures
pytestmark = pytest.mark.usefixtures("plane")


async def count(n: int) -> AsyncIterator[int]:
    for i in range(n):
        yield i


async def add_one(n: int) -> int:
    return n + 1


class UserError(Exception):
    pass


# -- one call


@pytest.fixture
async def pair(make: Make) -> tuple[Runtime, Runtime]:
    return await make(), await make()


Serve = Callable[..., Awaitable[Client]]


@pytest.fixture
def serve(pair: tuple[Runtime, Runtime], namespace: str) -> Serve:
    """Serve one method in one runtime; its client in the other."""

    async def serve(method: Callable[..., Any], request_type: Any = Any, endpoint: str = "run") -> Client:
        await pair[0].serve(namespace, "Worker", endpoint, method, request_type)
        client = await pair[1].client(namespace, "Worker", endpoint)
        await client.wait_for_instances(timeout_s=5)
        return client

    return serve


async def test_unary(serve: Serve) -> None:
    client = await serve(add_one, int)
    assert await call(client, 1, streaming=False) == 2
    assert await collect(call(client, 1, streaming=False)) == [2]


async def test_unary_without_a_request(serve: Serve) -> None:
    async def ping() -> str:
        return "pong"

    assert await call(await serve(ping), None, streaming=False) == "pong"


async def test_async_generator(serve: Serve) -> None:
    assert await collect(call(await serve(count), 2000)) == list(range(2000))


async def test_plain_function_that_gives_a_stream(serve: Serve) -> None:
    def pushed(n: int) -> Stream[int]:
        channel: Channel[int] = Channel()
        loop = asyncio.get_running_loop()
        for i in range(n):
            loop.call_soon(channel.push, i)
        loop.call_soon(channel.end)
        return Stream(channel)

    client = await serve(pushed)
    assert await collect(call(client, 5)) == list(range(5))
    assert await collect(await call(client, 5)) == list(range(5))


@pytest.mark.parametrize("items", [0, 3])
@pytest.mark.parametrize(
    "error",
    [RequestError("bad", hint="mend it", param="n"), OverloadedError("full"), KeyError("k"), UserError("u", 1)],
)
async def test_errors_are_raised_as_their_class_after_the_items(serve: Serve, error: Exception, items: int) -> None:
    async def fail(n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i
        raise error

    stream = call(await serve(fail), items)
    assert [await anext(stream) for _ in range(items)] == list(range(items))
    with pytest.raises(type(error)) as caught:
        await anext(stream)
    assert str(caught.value) == str(error)
    if isinstance(error, DynamoError):
        assert isinstance(caught.value, DynamoError)
        assert (caught.value.hint, caught.value.param) == (error.hint, error.param)
    assert caught.value.__notes__ == ["raised in callee run"]


async def test_unary_errors_and_invalid_results(serve: Serve) -> None:
    class Local(Exception):
        def __init__(self) -> None:
            super().__init__("a", "b")

    async def fail(kind: str) -> Any:
        if kind == "local":
            raise Local
        if kind == "unsendable":
            return object()
        if kind == "stop":
            raise StopAsyncIteration
        raise asyncio.CancelledError

    client = await serve(fail)
    with pytest.raises(RemoteError, match="Local"):
        await call(client, "local", streaming=False)
    with pytest.raises(TypeError, match="cannot send a object"):
        await call(client, "unsendable", streaming=False)
    with pytest.raises(RuntimeError):
        await call(client, "stop", streaming=False)
    with pytest.raises(UnavailableError, match="cancelled"):
        await call(client, "cancel", streaming=False)


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def unspeakable(n: int) -> Any:
    raise Unspeakable


async def unspeakable_later(n: int) -> Any:
    raise Unspeakable


@pytest.mark.parametrize("fail", [unspeakable, unspeakable_later])
async def test_an_error_without_a_text_fails_its_own_call_only(
    serve: Serve, fail: Any, pair: tuple[Runtime, Runtime], namespace: str
) -> None:
    client, other = await serve(fail), await serve(count, endpoint="other")
    running = call(other, 20)
    assert await anext(running) == 0
    async with asyncio.timeout(2):
        with pytest.raises(Unspeakable):
            await call(client, 1, streaming=False)
        assert await collect(running) == list(range(1, 20))
    assert pair[0].server.active == 0


async def test_plain_value_instead_of_an_awaitable(serve: Serve) -> None:
    client = await serve(lambda n: n)
    with pytest.raises(TypeError, match="callee run returned a int"):
        await anext(call(client, 1))


async def test_invalid_request_is_refused(serve: Serve) -> None:
    client = await serve(add_one, int)
    with pytest.raises(BadCallError, match=r"Worker\.run: invalid request: invalid int"):
        await call(client, "text")
    with pytest.raises(TypeError, match="cannot send"):
        await call(client, object())


async def test_early_close_closes_the_generator(serve: Serve) -> None:
    closed = asyncio.Event()

    async def endless(_: Any) -> AsyncIterator[int]:
        try:
            while True:
                yield 1
                await asyncio.sleep(0.001)
        finally:
            closed.set()

    client = await serve(endless)
    for leave in ("aclose", "break", "cancelled task"):
        closed.clear()
        stream = call(client, None)
        assert await anext(stream) == 1
        if leave == "aclose":
            await stream.aclose()
        elif leave == "cancelled task":
            task = asyncio.create_task(collect(stream))
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        del stream
        async with asyncio.timeout(0.1):
            await closed.wait()


async def test_cancelled_unary_stops_the_method(serve: Serve) -> None:
    running, stopped = asyncio.Event(), asyncio.Event()

    async def slow(_: Any) -> None:
        running.set()
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()

    reply = call(await serve(slow), None, streaming=False)
    await asyncio.wait_for(running.wait(), 2)
    reply.cancel()
    async with asyncio.timeout(0.1):
        await stopped.wait()
    with pytest.raises(asyncio.CancelledError):
        await reply


async def test_cancel_through_two_hops(make: Make, namespace: str) -> None:
    worker, processor, frontend = await make(), await make(), await make()
    cancelled = asyncio.Event()
    credits: list[int] = []

    def generate(_: Any) -> Stream[int]:
        channel: Channel[int] = Channel(on_cancel=cancelled.set, on_consumed=credits.append)
        for i in range(5):
            channel.push(i)
        return Stream(channel)

    await worker.serve(namespace, "Worker", "generate", generate)
    to_worker = await processor.client(namespace, "Worker", "generate")
    await to_worker.wait_for_instances(timeout_s=5)

    def relay(request: Any) -> Stream[str]:
        async def later() -> Stream[str]:
            return call(to_worker, request).map(str)

        return Stream.opening(later())

    await processor.serve(namespace, "Processor", "chat", relay)
    to_processor = await frontend.client(namespace, "Processor", "chat")
    await to_processor.wait_for_instances(timeout_s=5)
    stream = call(to_processor, None)
    assert [await anext(stream) for _ in range(5)] == list("01234")
    started = time.monotonic()
    stream.cancel()
    await asyncio.wait_for(cancelled.wait(), 1)
    assert time.monotonic() - started < 1.0


async def test_a_slow_reader_two_hops_away_holds_the_generator(make: Make, namespace: str) -> None:
    worker, processor, frontend = await make(), await make(), await make()
    produced = 0

    async def generate(n: int) -> AsyncIterator[int]:
        nonlocal produced
        for i in range(n):
            produced = i
            yield i

    await worker.serve(namespace, "Worker", "generate", generate)
    to_worker = await processor.client(namespace, "Worker", "generate")
    await processor.serve(namespace, "Processor", "chat", lambda n: call(to_worker, n).map(lambda i: -i))
    to_processor = await frontend.client(namespace, "Processor", "chat")
    await to_processor.wait_for_instances(timeout_s=5)
    await to_worker.wait_for_instances(timeout_s=5)
    stream = call(to_processor, 10_000)
    assert await anext(stream) == 0
    await asyncio.sleep(0.2)
    assert produced < 1.5 * listeners.WINDOW_ITEMS
    assert await collect(stream) == [-i for i in range(1, 10_000)]


async def test_deadline_at_client_and_server(serve: Serve) -> None:
    stopped = asyncio.Event()
    left: list[float | None] = []

    async def slow(_: Any) -> None:
        left.append(context.time_left_s())
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()

    client = await serve(slow)
    token = context.deadline.set(context.after(0.1))
    started = time.monotonic()
    with pytest.raises(DeadlineError, match="callee run did not finish"):
        await call(client, None, streaming=False)
    assert 0.08 < time.monotonic() - started < 1.0
    assert left[0] is not None
    assert 0 < left[0] <= 0.1
    await asyncio.wait_for(stopped.wait(), 0.1)
    with pytest.raises(DeadlineError):
        await call(client, None, streaming=False)
    context.deadline.reset(token)
    await call(await serve(add_one, endpoint="fast"), 1, streaming=False)


async def test_a_server_that_ignores_the_deadline(serve: Serve) -> None:
    def deaf(_: Any) -> Stream[int]:
        time.sleep(0.0)
        return Stream(Channel())

    client = await serve(deaf)
    server_flush = listeners.ServerConnection.flush
    try:
        listeners.ServerConnection.flush = lambda self: None  # type: ignore[method-assign]  # it hangs
        token = context.deadline.set(context.after(0.05))
        with pytest.raises(DeadlineError):
            await anext(call(client, None))
        context.deadline.reset(token)
    finally:
        listeners.ServerConnection.flush = server_flush  # type: ignore[method-assign]


async def test_request_ids_are_passed_on(serve: Serve) -> None:
    async def who(_: Any) -> str:
        await asyncio.sleep(0)
        return log.request_id.get()

    client = await serve(who)
    token = log.request_id.set("req-7")
    assert await call(client, None, streaming=False) == "req-7"
    log.request_id.reset(token)
    made = [await call(client, None, streaming=False) for _ in range(2)]
    assert len(set(made)) == 2
    assert all(made)
    assert log.request_id.get() == ""


async def test_bodies_over_the_limit_of_nats(serve: Serve) -> None:
    async def size(data: bytes) -> int:
        return len(data)

    client = await serve(size, bytes)
    limit = client._nats.max_payload_bytes
    for n in (limit - 200, limit - 100, limit, limit + 1, 3 * limit):
        assert await call(client, bytes(n), streaming=False) == n
    many = [call(client, bytes(limit + i), streaming=False) for i in range(8)]
    assert await asyncio.gather(*(asyncio.ensure_future(one._result()) for one in many)) == [
        limit + i for i in range(8)
    ]


async def test_a_request_that_is_too_large_is_refused(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client = await serve(add_one)
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 9 << 20)  # more than NATS takes
    with pytest.raises(RequestError, match="too many for one message"):
        await call(client, bytes(10 << 20), streaming=False)
    assert await call(client, 1, streaming=False) == 2


async def test_an_unsendable_item_fails_its_own_stream(serve: Serve) -> None:
    async def items(bad: bool) -> AsyncIterator[Any]:
        for i in range(10):
            yield object() if bad and i == 5 else i
            await asyncio.sleep(0)

    client = await serve(items)
    good = [asyncio.create_task(collect(call(client, False))) for _ in range(5)]
    broken = call(client, True)
    assert [await anext(broken) for _ in range(5)] == list(range(5))
    with pytest.raises(TypeError):
        await anext(broken)
    assert await asyncio.gather(*good) == [list(range(10))] * 5


async def test_five_hundred_concurrent_streams(serve: Serve, pair: tuple[Runtime, Runtime]) -> None:
    client = await serve(count)
    started = time.monotonic()
    results = await asyncio.gather(*(collect(call(client, 20 + i % 7)) for i in range(500)))
    assert results == [list(range(20 + i % 7)) for i in range(500)]
    assert time.monotonic() - started < 10
    assert pair[0].server.active == 0
    assert not any(
        pooled.connection.streams for pooled, _ in pair[1].connections._connections.values() if pooled.connection
    )


async def test_an_endpoint_name_that_is_a_prefix_of_another(serve: Serve) -> None:
    async def named(name: str) -> str:
        return name

    short = await serve(lambda _: named("short"), endpoint="generate")
    long = await serve(lambda _: named("long"), endpoint="generate2")
    nested = await serve(lambda _: named("nested"), endpoint="generate/2")
    assert [await call(c, None, streaming=False) for c in (short, long, nested)] == ["short", "long", "nested"]
    assert [len(c.instance_ids()) for c in (short, long, nested)] == [1, 1, 1]


async def test_same_endpoint_name_of_two_components(make: Make, namespace: str) -> None:
    server, caller = await make(), await make()
    await server.serve(namespace, "A", "run", add_one)
    await server.serve(namespace, "B", "run", count)
    a, b = await caller.client(namespace, "A", "run"), await caller.client(namespace, "B", "run")
    await a.wait_for_instances(timeout_s=5)
    await b.wait_for_instances(timeout_s=5)
    assert await call(a, 1, streaming=False) == 2
    assert await collect(call(b, 2)) == [0, 1]
    assert len(caller.connections._connections) == 1
    assert len(server.server.endpoints) == 2


@pytest.mark.parametrize("run_dir", [None, "x" * 120])
async def test_tcp_without_a_unix_socket(make: Make, namespace: str, tmp_path: Path, run_dir: str | None) -> None:
    if run_dir is not None:
        (tmp_path / run_dir).mkdir()
    server, caller = await make(run_dir=tmp_path / run_dir if run_dir else None), await make(run_dir=None)
    await server.serve(namespace, "Worker", "run", count)
    client = await caller.client(namespace, "Worker", "run")
    await client.wait_for_instances(timeout_s=5)
    assert list(server.listener.addresses) == ["tcp"]
    assert await collect(call(client, 3)) == [0, 1, 2]


# -- load balancing


async def several(make: Make, namespace: str, n: int) -> tuple[list[Runtime], Client]:
    servers = [await make() for _ in range(n)]
    for server in servers:

        async def who(_: Any, own: int = server.instance_id) -> int:
            return own

        await server.serve(namespace, "Worker", "who", who)
    client = await (await make()).client(namespace, "Worker", "who")
    await client.wait_for_instances(n, timeout_s=5)
    return servers, client


async def test_round_robin_random_and_direct(make: Make, namespace: str) -> None:
    servers, client = await several(make, namespace, 3)
    ids = {server.instance_id for server in servers}
    assert set(client.instance_ids()) == ids
    turns = [await call(client, None, streaming=False) for _ in range(30)]
    assert set(collections.Counter(turns).values()) == {10}
    assert turns[:3] == turns[3:6]
    drawn = [await call(client, None, "random", streaming=False) for _ in range(60)]
    assert set(drawn) == ids
    assert max(collections.Counter(drawn).values()) < 45
    for instance in ids:
        assert [await call(client, None, instance, streaming=False) for _ in range(3)] == [instance] * 3
    started = time.monotonic()
    with pytest.raises(NoInstancesError, match="instance 2a of") as caught:
        await call(client, None, 42, streaming=False)
    assert time.monotonic() - started < 1.0
    assert all(f"{instance:x}" in str(caught.value.hint) for instance in ids)


async def test_no_instances(make: Make, namespace: str) -> None:
    client = await (await make()).client(namespace, "Worker", "none")
    started = time.monotonic()
    with pytest.raises(NoInstancesError, match="no instance of"):
        await call(client, None, streaming=False)
    assert 0.9 < time.monotonic() - started < 1.5
    with pytest.raises(NoInstancesError, match="0 of 2 instances"):
        await client.wait_for_instances(2, timeout_s=0.01)


async def test_a_call_waits_for_an_instance_that_is_starting(make: Make, namespace: str) -> None:
    server, caller = await make(), await make()
    client = await caller.client(namespace, "Worker", "run")
    waiting = asyncio.create_task(collect(call(client, 2)))
    await asyncio.sleep(0.2)
    await server.serve(namespace, "Worker", "run", count)
    assert await waiting == [0, 1]


async def test_instances_join_and_leave(make: Make, namespace: str) -> None:
    servers, client = await several(make, namespace, 2)
    await servers[0].lease.revoke()
    await soon(lambda: len(client.instance_ids()) == 1)
    assert {await call(client, None, streaming=False) for _ in range(4)} == {servers[1].instance_id}
    await servers[1].deregister()
    await soon(lambda: not client.instance_ids())


async def test_a_draining_instance_refuses_and_clients_use_another(make: Make, namespace: str) -> None:
    servers, client = await several(make, namespace, 2)
    servers[0].server.draining = True  # before its clients know
    assert {await call(client, None, streaming=False) for _ in range(6)} == {servers[1].instance_id}
    with pytest.raises(UnavailableError, match="stopping"):
        await call(client, None, servers[0].instance_id, streaming=False)
    servers[0].listener.announce_stop()
    await soon(lambda: client.instance_ids() == [servers[1].instance_id])
    started = time.monotonic()
    with pytest.raises(NoInstancesError):
        await call(client, None, servers[0].instance_id, streaming=False)
    assert time.monotonic() - started < 1.0


async def test_drain_lets_running_calls_finish(make: Make, namespace: str) -> None:
    server, caller = await make(), await make()
    go = asyncio.Event()

    async def slow(n: int) -> AsyncIterator[int]:
        yield n
        await go.wait()
        yield n + 1

    await server.serve(namespace, "Worker", "run", slow)
    client = await caller.client(namespace, "Worker", "run")
    await client.wait_for_instances(timeout_s=5)
    stream, endless = call(client, 1), call(client, 5)
    assert (await anext(stream), await anext(endless)) == (1, 5)
    draining = asyncio.create_task(server.drain(5))
    await soon(lambda: not client.instance_ids())
    with pytest.raises(NoInstancesError):
        await call(client, 1)
    assert not draining.done()
    go.set()
    assert (await collect(stream), await collect(endless)) == ([2], [6])
    await asyncio.wait_for(draining, 1)


async def test_drain_gives_up_after_its_limit(make: Make, namespace: str) -> None:
    server, caller = await make(), await make()
    closed = asyncio.Event()
    channel: Channel[int] = Channel(on_cancel=closed.set)
    await server.serve(namespace, "Worker", "run", lambda _: Stream(channel))
    client = await caller.client(namespace, "Worker", "run")
    await client.wait_for_instances(timeout_s=5)
    stream = await call(client, None)
    await soon(lambda: server.server.active == 1)
    await server.drain(0.05)
    assert closed.is_set()
    with pytest.raises(UnavailableError, match="the service is stopping"):
        await anext(stream)


# -- closing


async def test_close_leaves_no_task(make: Make, namespace: str) -> None:
    before = asyncio.all_tasks()
    server, caller = await make(), await make()

    async def endless(_: Any) -> AsyncIterator[int]:
        while True:
            yield 1
            await asyncio.sleep(0.01)

    async def never(_: Any) -> None:
        await asyncio.Event().wait()

    await server.serve(namespace, "Worker", "endless", endless)
    await server.serve(namespace, "Worker", "never", never)
    client = await caller.client(namespace, "Worker", "endless")
    waits = await caller.client(namespace, "Worker", "never")
    unserved = await caller.client(namespace, "Worker", "unserved")
    await client.wait_for_instances(timeout_s=5)
    await waits.wait_for_instances(timeout_s=5)
    running, reply, opening = call(client, None), call(waits, None, streaming=False), call(unserved, None)
    assert await anext(running) == 1
    left = call(client, None)
    assert await anext(left) == 1
    client.leave(client._ready[0][0].id)  # its streams continue, on a retired connection
    assert await anext(left) == 1
    await caller.close()
    await server.close()
    for stream in (running, left, opening):
        with pytest.raises(UnavailableError):
            await collect(stream)
    with pytest.raises(UnavailableError):
        await reply
    with pytest.raises(UnavailableError, match="closed"):
        await call(client, None)
    await asyncio.sleep(0.05)
    assert asyncio.all_tasks() - before == set()
    await caller.close()
    with pytest.raises(TransportError, match="closed"):
        await caller.connect()


async def test_a_failed_connect_leaves_no_task(etcd_server: str) -> None:
    before = asyncio.all_tasks()
    runtime = Runtime(nats_url="nats://127.0.0.1:1", etcd_endpoints=etcd_server)
    started = time.monotonic()
    with pytest.raises(TransportError, match=r"cannot connect to NATS at nats://127.0.0.1:1: .*111"):
        await runtime.connect()
    assert time.monotonic() - started < 4
    await runtime.close()
    await asyncio.sleep(0.05)
    assert asyncio.all_tasks() - before == set()


async def test_cancelling_while_opening(make: Make, namespace: str) -> None:
    """A call that is cancelled at any step of its opening ends up running nowhere."""
    server, caller = await make(), await make()
    running: set[int] = set()

    async def endless(n: int) -> AsyncIterator[int]:
        running.add(n)
        try:
            while True:
                yield n
                await asyncio.sleep(0.001)
        finally:
            running.discard(n)

    await server.serve(namespace, "Worker", "run", endless)
    client = await caller.client(namespace, "Worker", "run")
    await client.wait_for_instances(timeout_s=5)
    for n in range(60):
        stream = call(client, n)
        for _ in range(n % 30):
            await asyncio.sleep(0)
        stream.cancel()
    await asyncio.sleep(0.1)
    await soon(lambda: not running and server.server.active == 0)
    assert not client._opening
    assert caller.connections._connections
    with contextlib.suppress(StopAsyncIteration):
        await anext(stream)


async def test_closing_ends_a_call_whose_opening_has_not_begun(make: Make, namespace: str) -> None:
    caller = await make()
    client = await caller.client(namespace, "Worker", "run")
    stream = call(client, None)
    await client.close()
    with pytest.raises(UnavailableError, match="closed"):
        await anext(stream)
