"""The `$SRV` protocol, used like `nats micro` does."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import nats
import pytest

from tests.contract.rpc_steps import Make, call, make, namespace

__all__ = ["make", "namespace"]  # fixtures


async def ask(url: str, subject: str, answers: int) -> list[dict[str, Any]]:
    """Return the answers that arrive within 0.1 s after the last expected one."""
    connection = await nats.connect(url)
    inbox = connection.new_inbox()
    subscription = await connection.subscribe(inbox)
    await connection.publish(subject, b"", reply=inbox)
    found: list[dict[str, Any]] = []
    try:
        while True:
            message = await subscription.next_msg(timeout=2 if len(found) < answers else 0.1)
            if not (message.headers and message.headers.get("Status") == "503"):
                found.append(json.loads(message.data))
    except TimeoutError:
        return found
    finally:
        await connection.close()


async def test_ping_info_and_stats(make: Make, namespace: str, nats_server: str) -> None:
    async def work(n: int) -> int:
        await asyncio.sleep(0.01)
        if n < 0:
            raise ValueError("negative")
        return n

    servers = [await make(), await make()]
    for server in servers:
        await server.serve(namespace, "Worker", "chat/completions", work, int)
    await servers[0].serve(namespace, "Other", "run", work, int)
    client = await (await make()).client(namespace, "Worker", "chat/completions")
    await client.wait_for_instances(2, timeout_s=5)
    busy = servers[0].instance_id
    for n in (1, 2, 3):
        assert await call(client, n, busy, streaming=False) == n
    for bad in (-1, "text"):
        with pytest.raises(ValueError if bad == -1 else Exception):
            await call(client, bad, busy, streaming=False)

    name = f"{namespace}_worker"
    pings = await ask(nats_server, f"$SRV.PING.{name}", 2)
    assert {ping["id"] for ping in pings} == {f"{server.instance_id:x}" for server in servers}
    assert {(ping["type"], ping["name"], ping["version"]) for ping in pings} == {
        ("io.nats.micro.v1.ping_response", name, "0.0.1")
    }
    everybody = [ping["name"] for ping in await ask(nats_server, "$SRV.PING", 3)]
    assert everybody.count(name) == 2
    assert everybody.count(f"{namespace}_other") == 1

    (info,) = await ask(nats_server, f"$SRV.INFO.{name}.{busy:x}", 1)
    assert info["type"] == "io.nats.micro.v1.info_response"
    (endpoint,) = info["endpoints"]
    assert endpoint["name"] == f"{name}-chat_completions-{busy:x}"
    assert endpoint["subject"] == f"{namespace}_worker.chat/completions-{busy:x}"
    assert endpoint["queue_group"] == "q"

    (stats,) = await ask(nats_server, f"$SRV.STATS.{name}.{busy:x}", 1)
    assert stats["type"] == "io.nats.micro.v1.stats_response"
    (endpoint,) = stats["endpoints"]
    assert (endpoint["num_requests"], endpoint["num_errors"]) == (5, 2)
    assert "invalid int" in endpoint["last_error"]
    assert 5e6 < endpoint["average_processing_time"] < 100e6
    assert endpoint["processing_time"] >= 4 * 9e6
    assert await ask(nats_server, f"$SRV.STATS.{namespace}_nobody", 0) == []


async def test_stats_data_of_a_service(make: Make, namespace: str, nats_server: str) -> None:
    server = await make()
    said: dict[str, Any] = {"kv_total_blocks": 100, "in_flight": 7}
    await server.serve(namespace, "Worker", "run", str, str, lambda: said)
    subject = f"$SRV.STATS.{namespace}_worker"
    (stats,) = await ask(nats_server, subject, 1)
    assert stats["endpoints"][0]["data"] == {"kv_total_blocks": 100, "in_flight": 0}
    said["what"] = object()
    (stats,) = await ask(nats_server, subject, 1)
    assert stats["endpoints"][0]["data"] == {"in_flight": 0}
