"""Topics over real NATS: between processes' runtimes, during an outage of the server, and with messages that it refuses."""

from __future__ import annotations

import asyncio
import logging
import signal

import msgspec
import pytest
import uvloop

from dynamo.errors import TransportError
from dynamo.launcher.embedded_servers import Infra
from dynamo.rpc.runtime import Runtime
from dynamo.sdk import Service, Topic, bind, depends, endpoint, service
from dynamo.sdk.channels import OpenTopic, attach
from dynamo.sdk.depends import Stub
from dynamo.sdk.spec import spec_of
from dynamo.transport import nats as transport
from dynamo.worker.broker import ServiceBroker
from dynamo.worker.stubs import InstancePool
from tests.contract.rpc_steps import Make, make, namespace, soon

__all__ = ["make", "namespace"]  # fixtures


class Event(msgspec.Struct, array_like=True):
    number: int
    data: bytes = b""


@service
class Worker(Service):
    events = Topic(Event)
    other = Topic(Event, name="other-events")

    @endpoint
    async def run(self, request: int) -> int:
        return request


@service
class Router(Service):
    worker = depends(Worker)


def joined(worker_side: Runtime, router_side: Runtime, namespace: str) -> tuple[Worker, Router]:
    """A service bound to its broker as in a graph."""
    worker, router = Worker(), Router()
    attach(worker, ServiceBroker(worker_side, namespace, "Worker"))
    bind(router, worker=Stub(spec_of(Worker), InstancePool(router_side, Worker, namespace)))
    return worker, router


async def test_messages_of_all_instances_arrive_in_order(make: Make, namespace: str) -> None:
    a, b, c = await make(), await make(), await make()
    worker, router = joined(a, c, namespace)
    second, _ = joined(b, c, namespace)
    seen: list[Event] = []
    subscription = await router.worker.events.subscribe(seen.append)
    for number in range(100):
        await worker.events.publish(Event(number))
        await second.events.publish(Event(1000 + number))
    await soon(lambda: len(seen) == 200)
    assert [event.number for event in seen if event.number < 1000] == list(range(100))
    assert [event.number for event in seen if event.number >= 1000] == list(range(1000, 1100))
    await subscription.close()
    await subscription.close()
    await worker.events.publish(Event(5))
    await worker.other.publish(Event(6))
    await c.nats.flush()
    assert len(seen) == 200


async def test_subject_and_payload(make: Make, namespace: str) -> None:
    runtime = await make()
    worker, _ = joined(runtime, runtime, namespace)
    heard: list[bytes] = []
    await runtime.listen(f"namespace.{namespace}.component.Worker.other-events", heard.append)
    await worker.other.publish(Event(7, b"x"))
    await soon(lambda: heard)
    assert msgspec.msgpack.decode(heard[0]) == [7, b"x"]


async def test_handlers_that_fail_and_messages_that_do_not_fit(
    make: Make, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = await make()
    worker, router = joined(runtime, runtime, namespace)
    seen: list[int] = []

    def handle(event: Event) -> None:
        if event.number == 0:
            raise KeyError("broken handler")
        seen.append(event.number)

    await router.worker.events.subscribe(handle)
    await worker.events.publish(Event(0))
    await runtime.send(f"namespace.{namespace}.component.Worker.events", b"\xc1")
    await worker.events.publish(Event(1))
    await soon(lambda: seen == [1])
    assert "subscriber of topic events failed" in caplog.text
    assert "broken handler" in caplog.text
    assert "dropped a message on topic events: invalid Event" in caplog.text


async def test_it_connects_at_the_first_use(nats_server: str, etcd_server: str, namespace: str) -> None:
    """A start hook may subscribe and publish before its process has joined the graph."""
    runtimes = [Runtime(nats_url=nats_server, etcd_endpoints=etcd_server) for _ in range(2)]
    worker, router = joined(*runtimes, namespace)
    assert isinstance(router.worker.events, OpenTopic)
    assert not any(hasattr(runtime, "nats") for runtime in runtimes)
    seen: list[Event] = []
    await router.worker.events.subscribe(seen.append)
    await worker.events.publish(Event(1))
    await soon(lambda: seen)
    for runtime in runtimes:
        await runtime.close()
    with pytest.raises(TransportError):
        await worker.events.publish(Event(2))


async def test_a_message_that_is_too_large(make: Make, namespace: str) -> None:
    runtime = await make()
    worker, router = joined(runtime, runtime, namespace)
    seen: list[Event] = []
    await router.worker.events.subscribe(seen.append)
    limit = runtime.nats.max_payload_bytes
    with pytest.raises(TransportError, match=rf"{limit + 9} bytes, the NATS server takes {limit}"):
        await worker.events.publish(Event(1, bytes(limit + 2)))
    await worker.events.publish(Event(2, bytes(limit - 100)))
    await soon(lambda: seen, 10)
    assert seen[0].number == 2


async def test_nats_outage(private_infra: Infra, namespace: str) -> None:
    infra = private_infra
    runtimes = [Runtime(nats_url=infra.nats_url, etcd_endpoints=infra.etcd_endpoints) for _ in range(2)]
    worker, router = joined(*runtimes, namespace)
    seen: list[int] = []
    await router.worker.events.subscribe(lambda event: seen.append(event.number))
    await worker.events.publish(Event(1))
    await soon(lambda: seen == [1])
    infra.processes["nats"].kill()
    await infra.processes["nats"].wait()
    await soon(lambda: not any(runtime.nats.connected for runtime in runtimes))
    for _ in range(3):
        with pytest.raises(TransportError, match="is unavailable"):
            await worker.events.publish(Event(2))
    late: list[int] = []
    await router.worker.events.subscribe(lambda event: late.append(event.number))
    await infra.restart_nats()
    await soon(lambda: all(runtime.nats.connected for runtime in runtimes), 10)
    await runtimes[1].nats.flush()
    await worker.events.publish(Event(3))
    await soon(lambda: 3 in seen and 3 in late)
    assert (seen, late) == ([1, 3], [3])
    for runtime in runtimes:
        await runtime.close()


async def publish_many(worker: Worker, message: Event, count: int) -> None:
    for _ in range(count):
        await worker.events.publish(message)
        await asyncio.sleep(0)


def test_the_buffer_for_a_server_that_hangs_is_bounded(private_infra: Infra, namespace: str) -> None:
    """On uvloop, as services run: asyncio's own loop had no bound in Python 3.12.0 to 3.12.8 and 3.13.0 to 3.13.1."""

    async def run() -> None:
        runtime = Runtime(nats_url=private_infra.nats_url, etcd_endpoints=private_infra.etcd_endpoints)
        worker, _ = joined(runtime, runtime, namespace)
        await worker.events.publish(Event(1))
        process = private_infra.processes["nats"]
        process.send_signal(signal.SIGSTOP)
        message = Event(2, bytes(4 << 20))
        try:
            with pytest.raises(TransportError, match="the send buffer is full"):
                await publish_many(worker, message, transport.PENDING_BYTES // len(message.data) + 20)
        finally:
            process.send_signal(signal.SIGCONT)
        await runtime.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


async def test_dropped_messages_of_a_slow_subscriber_are_logged_once(
    make: Make, namespace: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(transport, "LISTENER_MESSAGES", 10)
    publisher, subscriber = await make(), await make()
    worker, router = joined(publisher, subscriber, namespace)
    seen: list[int] = []
    await router.worker.events.subscribe(lambda event: seen.append(event.number))
    with caplog.at_level(logging.WARNING, "dynamo.transport.nats"):
        for number in range(2000):
            await worker.events.publish(Event(number))  # all arrive before the subscriber's task runs
        await soon(lambda: "are dropped" in caplog.text)
        await subscriber.nats.flush()
    assert caplog.text.count("are dropped: their listener is too slow") == 1
    assert 10 <= len(seen) < 2000
    await worker.events.publish(Event(5000))
    await soon(lambda: seen[-1] == 5000)
