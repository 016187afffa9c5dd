"""The metrics port of a host and the sockets behind it: real ones, with processes that answer, hang or have ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import tempfile
from collections.abc import AsyncIterator, Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dynamo.config.options import ServeOptions
from dynamo.errors import ConfigError
from dynamo.http import metrics_server
from dynamo.http.prometheus_text import Pages, family
from dynamo.launcher import host_metrics, metrics_port, ports
from dynamo.launcher.host_metrics import HostMetrics, ask_process, serve, serve_alone
from dynamo.launcher.managed_process import ProcessSpec
from dynamo.launcher.metrics_port import MetricsPort, check, check_addresses, claim
from dynamo.launcher.process_slot import ProcessState
from dynamo.worker import metrics_socket
from dynamo.worker.metrics_socket import METRICS, TARGETS, MetricsSocket, ask, path_of
from tests.ports import free_port, free_ports

NATS = "nats://127.0.0.1:4222"


@pytest.fixture
def run_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as short:  # a socket's path may have 107 bytes
        yield Path(short)


@contextlib.contextmanager
def claimed(host: str | None = None, port: int | None = None, taken: Collection[int] = ()) -> Iterator[MetricsPort]:
    found = claim(ServeOptions(metrics_host=host, metrics_port=port), NATS, taken)
    assert found is not None
    yield found
    found.close()


def pages(service: str) -> Pages:
    async def metrics() -> bytes:
        return family("jobs_total", "counter", "Jobs done.", [({"service": service}, 2)])

    async def targets() -> bytes:
        return b'[{"targets": ["10.0.0.1:9091"], "labels": {}}]'

    return {METRICS: metrics, TARGETS: targets}


@contextlib.asynccontextmanager
async def answering(path: Path, pages: Pages) -> AsyncIterator[None]:
    found = MetricsSocket(path, pages)
    await found.open()
    yield
    found.close()


# -- the port


def test_the_first_free_port_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = sorted(free_ports(2))
    monkeypatch.setattr(metrics_port, "DEFAULT_PORTS", (first, second))
    with claimed() as one, claimed() as two:
        assert [one.address, two.address] == [f"127.0.0.1:{first}", f"127.0.0.1:{second}"]
        assert one.url == f"http://127.0.0.1:{first}/metrics"
        with pytest.raises(ConfigError, match=f"no free port for metrics on 127.0.0.1: {first} to {second} are in use"):
            claim(ServeOptions(), NATS)
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{first} for metrics: Address") as error:
            claim(ServeOptions(metrics_port=first), NATS)
        assert error.value.hint == f"choose another port: --metrics-port {first + 1}, or 0 for none"
    with claimed(taken={first}) as found:
        assert found.address == f"127.0.0.1:{second}"
    assert claim(ServeOptions(metrics_port=0), NATS) is None


def test_a_port_of_the_graph_is_refused() -> None:
    port = free_port()
    check(ServeOptions(metrics_port=port), NATS, {port + 1})
    check(ServeOptions(), NATS, {port})
    with pytest.raises(ConfigError, match=f"--metrics-port {port}: the graph's own HTTP has this port"):
        check(ServeOptions(metrics_port=port), NATS, {port})
    system = ProcessSpec("Worker", 1, (), {"DYNAMO_SYSTEM_APP_PORT": "9093"}, "/")
    assert ports.configured_ports(("127.0.0.1", 9091), [system, replace(system, env={})]) == {9091, 9093}
    assert ports.configured_ports(None, []) == set()


@pytest.mark.parametrize("variable", ["", "DYN_HOST_IP", "DYN_BIND_IP"])
def test_an_address_of_another_host_is_an_error(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_addresses(ServeOptions(metrics_host="127.0.0.1"), NATS)
    options, fact = ServeOptions(metrics_host="192.0.2.8"), "cannot listen on 192.0.2.8 for metrics: Cannot assign"
    if variable:
        monkeypatch.setenv(variable, "192.0.2.8")
        options, fact = ServeOptions(), f"{variable}=192.0.2.8: not an address of this host"
    with pytest.raises(ConfigError, match=fact) as error:
        check_addresses(options, NATS)
    assert "give an address of this host" in str(error.value.hint)
    if not variable:
        check_addresses(ServeOptions(metrics_host="192.0.2.8", metrics_port=0), NATS)  # metrics are off


def test_the_announced_address_is_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("DYN_HOST_IP", "127.0.0.2")
    with claimed(port=port) as found:
        assert found.address == f"127.0.0.2:{port}"
        assert {each.getsockname()[0] for each in found.listeners} >= {"127.0.0.2"}
    monkeypatch.setenv("DYN_HOST_IP", "192.0.2.7")  # the machine's address, on which a container cannot listen
    monkeypatch.setenv("DYN_BIND_IP", "0.0.0.0")
    with claimed(port=port) as found:
        assert found.address == f"192.0.2.7:{port}"
        assert [each.getsockname()[0] for each in found.listeners] == ["0.0.0.0"]
    with claimed("0.0.0.0", port) as found:
        assert found.address == f"192.0.2.7:{port}"
    with claimed("127.0.0.1", port) as found:
        assert found.address == f"127.0.0.1:{port}"
    with pytest.raises(ConfigError, match=f"cannot listen on 192.0.2.8:{port} for metrics") as error:
        claim(ServeOptions(metrics_host="192.0.2.8", metrics_port=port), NATS)
    assert "--metrics-host" in str(error.value.hint)


async def test_pages_are_served_from_the_first_connection_on() -> None:
    with claimed(port=free_port()) as port:
        serving = asyncio.create_task(serve(port, pages("Worker")))
        base = port.url.removesuffix(METRICS)
        async with httpx.AsyncClient(base_url=base, trust_env=False) as http:
            answers = await asyncio.gather(*(http.get(METRICS) for _ in range(5)))
            assert {answer.text for answer in answers} == {(await pages("Worker")[METRICS]()).decode()}
            assert answers[0].headers["content-type"].startswith("text/plain; version=0.0.4")
            targets = await http.get(TARGETS)
            assert (targets.json()[0]["targets"], targets.headers["content-type"]) == (
                ["10.0.0.1:9091"],
                "application/json",
            )
            head = await http.head(METRICS)
            assert (head.status_code, head.content) == (200, b"")
            assert (await http.get("/")).status_code == 404
            assert (await http.post(METRICS)).status_code == 405
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        async with httpx.AsyncClient(trust_env=False) as http:
            with pytest.raises(httpx.ConnectError):
                await http.get(port.url)


async def test_a_failing_page_leaves_the_server_running(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> bytes:
        raise RuntimeError("broken")

    with claimed(port=free_port()) as port:
        serving = asyncio.create_task(serve(port, {METRICS: fail, TARGETS: pages("Worker")[TARGETS]}))
        async with httpx.AsyncClient(trust_env=False) as http:
            assert (await http.get(port.url)).status_code == 500
            assert (await http.get(f"{port.url}/targets")).status_code == 200
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
    assert "failed to serve /metrics" in caplog.text


async def test_a_failing_server_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: Any) -> NoReturn:
        raise RuntimeError("broken")

    monkeypatch.setattr(metrics_server.MetricsServer, "serve", fail)
    with claimed(port=free_port()) as port:
        serving = asyncio.create_task(serve(port, pages("Worker")))
        async with httpx.AsyncClient(trust_env=False) as http:
            with pytest.raises(httpx.TransportError):
                await http.get(port.url)
        await asyncio.wait_for(serving, 5)
    assert f"the metrics port is closed: {port.url}" in caplog.text


# -- the processes


async def test_a_process_answers_on_its_socket(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = path_of(run_dir, "VllmWorker:1")
    assert await ask(path, METRICS) == b""  # no socket
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))  # left by a process that was killed
    assert await ask(path, METRICS) == b""

    async def fail() -> bytes:
        raise RuntimeError("a collector is broken")

    async with answering(path, {**pages("VllmWorker"), "/broken": fail}):
        found = await asyncio.gather(*(ask(path, METRICS) for _ in range(9)))
        assert set(found) == {await pages("VllmWorker")[METRICS]()}
        assert await ask(path, "/other") == b""
        assert await ask(path, "/broken") == b""
        assert "a collector is broken" in caplog.text
        assert json.loads(await ask(path, TARGETS))[0]["targets"] == ["10.0.0.1:9091"]
    assert not path.exists()


async def test_a_truncated_page_is_dropped(run_dir: Path) -> None:
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"1000\n# HELP a A.\n# TYPE a gau")
        writer.close()

    async with await asyncio.start_unix_server(die, run_dir / "killed"):
        assert await ask(run_dir / "killed", METRICS) == b""


async def test_a_socket_path_that_is_too_long_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with answering(tmp_path / ("x" * 120), pages("Worker")):
        assert "the metrics port will not include this process" in caplog.text


def state(service: str, worker: int, *, ready: bool, restarts: int = 0, pid: int | None = None) -> ProcessState:
    return ProcessState(ProcessSpec(service, worker, (), {}, "/", 2, "mine"), ready, restarts, pid)


async def test_a_host_shows_which_processes_are_up(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process answers, one hangs, one is not ready, one has no socket."""
    monkeypatch.setattr(metrics_socket, "ASK_S", 0.5)
    processes = [
        state("Processor", 1, ready=True, restarts=1),
        state("Processor", 2, ready=True),
        state("VllmWorker", 1, ready=False),
        state("VllmWorker", 2, ready=True, restarts=3, pid=os.getpid()),
    ]
    host = HostMetrics("10.0.0.9:9091", lambda: processes, partial(ask_process, run_dir))
    with socket.socket(socket.AF_UNIX) as hanging:
        hanging.bind(str(path_of(run_dir, "Processor:1")))
        hanging.listen()
        async with (
            answering(path_of(run_dir, "VllmWorker:1"), pages("not asked")),
            answering(path_of(run_dir, "VllmWorker:2"), pages("VllmWorker")),
        ):
            async with asyncio.timeout(10):
                text = (await host.metrics()).decode()
                assert json.loads(await host.targets())[0]["targets"] == ["10.0.0.1:9091"]
        assert json.loads(await host.targets())[0]["targets"] == ["10.0.0.9:9091"]
    families = {found.name: found for found in text_string_to_metric_families(text)}
    up, restarts = (
        {(s.labels["service"], s.labels["worker"]): s.value for s in families[name].samples}
        for name in ("dynamo_supervisor_process_up", "dynamo_supervisor_restarts")
    )
    assert up == {("Processor", "1"): 0, ("Processor", "2"): 0, ("VllmWorker", "1"): 0, ("VllmWorker", "2"): 1}
    assert (restarts["Processor", "1"], restarts["Processor", "2"], restarts["VllmWorker", "2"]) == (1, 0, 3)
    assert [sample.labels["service"] for sample in families["jobs"].samples] == ["VllmWorker"]
    own = [family for name, family in families.items() if name.startswith("dynamo_supervisor_")]
    assert [{sample.labels["namespace"] for sample in family.samples} for family in own] == [{"mine"}] * 4
    memory = {tuple(s.labels.values())[1:]: s.value for s in families["dynamo_supervisor_tree_resident_bytes"].samples}
    assert [worker for worker, size in memory.items() if size] == [("VllmWorker", "2")]


async def test_all_processes_are_asked_for_targets_in_parallel(run_dir: Path) -> None:
    """Seven of eight hang: the answer of the eighth is returned before the others time out."""
    asked: list[str] = []

    async def ask(process: ProcessState, page: str) -> bytes:
        asked.append(process.spec.name)
        if process.spec.worker_id == 5:
            return page.encode()
        return await asyncio.get_running_loop().create_future()

    processes = [state("VllmWorker", number, ready=True) for number in range(1, 9)]
    host = HostMetrics("10.0.0.9:9091", lambda: processes, ask)
    assert await asyncio.wait_for(host.targets(), 5) == TARGETS.encode()
    assert len(asked) == 8


async def test_concurrent_scrapers_share_one_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, go_on = 0, asyncio.Event()

    async def ask(_: ProcessState, __: str) -> bytes:
        nonlocal asked
        asked += 1
        await go_on.wait()
        return family("scrape", "gauge", "Number of it.", [({}, asked)])

    host = HostMetrics("10.0.0.9:9091", lambda: [state("VllmWorker", 1, ready=True)], ask)
    scrapers = [asyncio.create_task(host.metrics()) for _ in range(5)]
    await asyncio.sleep(0)
    scrapers[0].cancel()  # a client that disconnects
    go_on.set()
    pages = await asyncio.gather(*scrapers[1:], host.metrics())
    assert (len(set(pages)), asked) == (1, 1)
    monkeypatch.setattr(host_metrics, "REUSE_S", 0.0)
    assert await host.metrics() != pages[0]
    assert asked == 2


async def test_a_process_without_supervisor_reports_itself() -> None:
    ready, spec = False, ProcessSpec("Worker", 1, (), {}, "/", 1, "mine")
    with claimed(port=free_port()) as port:
        serving = asyncio.create_task(serve_alone(port, spec, pages("Worker"), lambda: ready))
        async with httpx.AsyncClient(trust_env=False) as http:
            labels = '{namespace="mine",service="Worker",worker="1"}'
            before = (await http.get(port.url)).text
            assert f"dynamo_supervisor_process_up{labels} 0.0" in before
            assert "jobs_total" not in before
            ready = True
            async with asyncio.timeout(10):
                while "jobs_total" not in (text := (await http.get(port.url)).text):
                    await asyncio.sleep(0.05)
            assert f"dynamo_supervisor_process_up{labels} 1.0" in text
            assert f"dynamo_supervisor_restarts_total{labels} 0.0" in text
            (used,) = re.findall(f"dynamo_supervisor_tree_resident_bytes{re.escape(labels)} (.*)", text)
            assert float(used) > 1 << 20
            assert (await http.get(f"{port.url}/targets")).json()[0]["targets"] == ["10.0.0.1:9091"]
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
