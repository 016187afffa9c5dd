"""The client of an endpoint without servers: how calls are opened, closed and bound to a stub."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from dynamo import codec
from dynamo.errors import UnavailableError
from dynamo.rpc.client import Client
from dynamo.rpc.connection_pool import ConnectionPool
from dynamo.rpc.runtime import Runtime
from dynamo.sdk import Service, endpoint, service
from dynamo.sdk.depends import Stub
from dynamo.sdk.spec import spec_of
from dynamo.streams import Channel, Reply, Stream
from dynamo.transport.nats import Nats
from dynamo.worker.stubs import InstancePool

DECODE = codec.decoder(Any)


def make_client() -> Client:
    return Client(("test", "Worker", "generate"), cast("Nats", None), ConnectionPool())


async def test_close_ends_the_calls_that_wait_for_an_instance() -> None:
    client = make_client()
    started = client.call("hello", "round_robin", decode=DECODE, streaming=True)
    await asyncio.sleep(0)
    unstarted = client.call("hello", "round_robin", decode=DECODE, streaming=True)
    await client.close()
    late = client.call("hello", "round_robin", decode=DECODE, streaming=True)
    for stream in (started, unstarted, late):
        with pytest.raises(UnavailableError, match="the client of test/Worker/generate is closed"):
            await anext(stream)


async def test_close_does_not_end_a_call_that_was_just_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    accepted: list[Channel[Any]] = []

    async def accept(_: Client, channel: Channel[Any], *__: object) -> None:
        accepted.append(channel)

    monkeypatch.setattr(Client, "send_with_retry", accept)
    client = make_client()
    stream = client.call("hello", "round_robin", decode=DECODE, streaming=True)
    await asyncio.sleep(0)  # the request is sent; the task's callbacks run in the loop's next iteration
    await client.close()
    accepted[0].push("item")
    accepted[0].end()
    assert [item async for item in stream] == ["item"]


@service
class Worker(Service):
    @endpoint
    async def generate(self, text: str) -> str:
        return text


async def test_a_method_kept_from_before_the_connection_calls_directly_afterwards() -> None:
    class FakeClient:
        def call(self, request: Any, choice: Any, avoid: Any, *, decode: Any, streaming: bool) -> Stream[Any]:
            channel: Channel[Any] = Channel()
            channel.source = 7
            channel.push(request)
            channel.end()
            return Reply(channel)

    class FakeRuntime:
        async def client(self, *_: str) -> FakeClient:
            return FakeClient()

    pool = InstancePool(cast("Runtime", FakeRuntime()), Worker, "test")
    generate = Stub(spec_of(Worker), pool).generate
    await pool.connect()
    reply = generate("hello")
    assert reply.source == 7
    assert await reply == "hello"
