"""Live settings over a real etcd, also one that goes away."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from dynamo.launcher.embedded_servers import Infra
from dynamo.rpc.runtime import Runtime
from dynamo.sdk import service
from dynamo.transport.etcd import Etcd
from dynamo.worker.live_settings import LiveSettings
from tests.contract.rpc_steps import soon


@service
class Tuned:
    live_settings = ("mode",)

    def __init__(self, mode: str = "quiet") -> None:
        self.mode = mode


@service
class Fixed:
    def __init__(self, mode: str = "quiet") -> None:
        self.mode = mode


Start = Callable[[Any], Awaitable[Runtime]]


@pytest.fixture
def namespace() -> str:
    return f"t{uuid.uuid4().hex[:12]}"


@pytest.fixture
async def etcd(private_infra: Infra) -> AsyncIterator[Etcd]:
    async with Etcd.connect(private_infra.etcd_endpoints) as etcd:
        yield etcd


@pytest.fixture
async def start(private_infra: Infra, namespace: str) -> AsyncIterator[Start]:
    """Starts the live settings of an object in a runtime of its own, as a process of it would."""
    started: list[tuple[Runtime, LiveSettings]] = []

    async def start(instance: Any) -> Runtime:
        runtime = Runtime(nats_url=private_infra.nats_url, etcd_endpoints=private_infra.etcd_endpoints)
        await runtime.connect()
        live = LiveSettings(instance, namespace)
        started.append((runtime, live))
        await live.start(runtime)
        return runtime

    yield start
    for runtime, live in started:
        await live.stop()
        await runtime.close()


async def published_modes(etcd: Etcd) -> list[str]:
    """What the processes say that they have."""
    items, _ = await etcd.get_prefix("settings/")
    return sorted(json.loads(item.value)["mode"]["value"] for item in items)


async def test_what_is_there_holds_before_the_first_request(start: Start, etcd: Etcd, namespace: str) -> None:
    await etcd.put(f"/{namespace}/tuned/mode", b"loud")
    instance = Tuned()
    await start(instance)
    assert instance.mode == "loud"


async def test_put_and_delete_reach_every_process(start: Start, etcd: Etcd, namespace: str) -> None:
    both = [Tuned(), Tuned(mode="hushed")]
    first, _ = [await start(instance) for instance in both]
    await etcd.put(f"/{namespace}/tuned/mode", b"loud")
    await soon(lambda: [instance.mode for instance in both] == ["loud", "loud"])
    await etcd.delete(f"/{namespace}/tuned/mode")
    await soon(lambda: [instance.mode for instance in both] == ["quiet", "hushed"])
    async with asyncio.timeout(5):
        while await published_modes(etcd) != ["hushed", "quiet"]:
            await asyncio.sleep(0.01)
    await first.close()  # what it published is removed with it
    assert await published_modes(etcd) == ["hushed"]


async def test_etcd_away(start: Start, etcd: Etcd, namespace: str, private_infra: Infra) -> None:
    """The last values stay, and changes are followed when it is back."""
    instance = Tuned()
    await start(instance)
    await etcd.put(f"/{namespace}/tuned/mode", b"loud")
    await soon(lambda: instance.mode == "loud")
    private_infra.processes["etcd"].kill()
    await private_infra.processes["etcd"].wait()
    assert instance.mode == "loud"
    await private_infra.restart_etcd()
    await etcd.put(f"/{namespace}/tuned/mode", b"louder")
    await soon(lambda: instance.mode == "louder", 10)


async def test_a_class_without_live_settings_follows_nothing(start: Start, etcd: Etcd, namespace: str) -> None:
    instance = Fixed()
    await start(instance)
    other = Tuned()
    await start(other)
    await etcd.put(f"/{namespace}/fixed/mode", b"loud")
    await etcd.put(f"/{namespace}/tuned/mode", b"loud")
    await soon(lambda: other.mode == "loud")
    assert instance.mode == "quiet"
    assert len(await published_modes(etcd)) == 1
