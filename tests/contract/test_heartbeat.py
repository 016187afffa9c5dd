"""Heartbeats distinguish a stopped process from a busy one: real processes, real signals."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from dynamo.errors import ConfigError, TransportError
from dynamo.rpc import heartbeat
from dynamo.rpc.connection_pool import silence_s

BUSY = """
import time
from dynamo.rpc.heartbeat import Heartbeat
heartbeat = Heartbeat("127.0.0.1")
print(heartbeat.address, flush=True)
while True:
    time.sleep(60)  # like an event loop that is blocked
"""


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.1)
    monkeypatch.setattr(heartbeat, "FIRST_ECHO_TIMEOUT_S", 1.0)


@pytest.fixture
def process() -> Iterator[tuple[subprocess.Popen[str], str]]:
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True) as found:
        assert found.stdout is not None
        try:
            yield found, found.stdout.readline().strip()
        finally:
            found.kill()


async def test_silence_is_reported_once_and_a_stopped_process_is_not_monitored(
    process: tuple[subprocess.Popen[str], str],
) -> None:
    worker, address = process
    silent: list[int] = []
    monitored = await heartbeat.monitor(address, 0.5, lambda: silent.append(1))
    assert monitored is not None
    await asyncio.sleep(1.5)
    assert not silent  # its main thread is busy all the time
    worker.send_signal(signal.SIGSTOP)
    async with asyncio.timeout(10):
        while not silent:
            await asyncio.sleep(0.05)
    with pytest.raises(TransportError, match="stopped"):
        await heartbeat.monitor(address, 0.5, lambda: silent.append(2))
    worker.send_signal(signal.SIGCONT)
    again = await heartbeat.monitor(address, 5, lambda: silent.append(3))
    assert again is not None
    await asyncio.sleep(0.5)
    again.close()
    assert silent == [1]


async def test_a_process_that_died_is_not_silent(process: tuple[subprocess.Popen[str], str]) -> None:
    worker, address = process
    silent: list[int] = []
    assert await heartbeat.monitor(address, 0.3, lambda: silent.append(1)) is not None
    worker.kill()
    await asyncio.sleep(1)
    assert not silent  # its RPC connection is lost too


async def test_an_unreachable_heartbeat_is_not_monitored() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert await heartbeat.monitor(f"127.0.0.1:{port}", 1, lambda: None) is None
    assert await heartbeat.monitor("nowhere", 1, lambda: None) is None


async def test_many_monitors_and_close() -> None:
    found = heartbeat.Heartbeat("127.0.0.1")
    monitors = [await heartbeat.monitor(found.address, 1, lambda: None) for _ in range(20)]
    assert all(monitors)
    for monitored in monitors[:10]:
        assert monitored is not None
        monitored.close()
    assert await heartbeat.monitor(found.address, 1, lambda: None) is not None
    found.close()
    assert await heartbeat.monitor(found.address, 1, lambda: None) is None


@pytest.mark.parametrize("bad", ["soon", "-1", "inf", "nan"])
def test_the_setting(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_PEER_SILENCE_S", bad)
    with pytest.raises(ConfigError, match="DYN_PEER_SILENCE_S"):
        silence_s()
    monkeypatch.setenv("DYN_PEER_SILENCE_S", "0")
    assert silence_s() == 0
