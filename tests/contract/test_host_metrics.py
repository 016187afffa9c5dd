"""The metrics port of a host, and the sockets behind it: real ones, with processes that answer, are slow or are gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dynamo.config.options import ServeOptions
from dynamo.errors import ConfigError
from dynamo.http.exposition import family
from dynamo.serve import host_metrics, metrics_socket
from dynamo.serve.child import ProcessSpec
from dynamo.serve.host_metrics import HostMetrics, MetricsPort, claim, serve
from dynamo.serve.infra import free_ports
from dynamo.serve.metrics_socket import METRICS, TARGETS, MetricsSocket, Pages, ask, path_of
from dynamo.serve.supervisor import ProcessState

NATS = "nats://127.0.0.1:4222"


@pytest.fixture
def run_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as short:  # a socket's path may have 107 bytes
        yield Path(short)


@contextlib.contextmanager
def claimed(host: str | None = None, port: int | None = None, nats: str = NATS) -> Iterator[MetricsPort]:
    found = claim(ServeOptions(metrics_host=host, metrics_port=port), nats)
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


def test_the_port_is_the_next_one_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = sorted(free_ports(2))
    monkeypatch.setattr(host_metrics, "DEFAULT_PORTS", (first, second))
    with claimed() as one, claimed() as two:
        assert [one.address, two.address] == [f"127.0.0.1:{first}", f"127.0.0.1:{second}"]
        assert one.url == f"http://127.0.0.1:{first}/metrics"
        with pytest.raises(ConfigError, match=f"ports {first} to {second} are taken"):
            claim(ServeOptions(), NATS)
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{first} for metrics: Address") as error:
            claim(ServeOptions(metrics_port=first), NATS)
        assert error.value.hint == f"choose another port: --metrics-port {first + 1}, or 0 for none"
    assert claim(ServeOptions(metrics_port=0), NATS) is None


def test_others_are_told_an_address_that_they_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_ports(1)[0]
    monkeypatch.setenv("DYN_HOST_IP", "127.0.0.2")
    with claimed(port=port) as found:
        assert found.address == f"127.0.0.2:{port}"
        assert {each.getsockname()[0] for each in found.listeners} >= {"127.0.0.2"}
    monkeypatch.setenv("DYN_HOST_IP", "192.0.2.7")  # the machine's, which no container can listen on
    monkeypatch.setenv("DYN_BIND_IP", "0.0.0.0")
    with claimed(port=port) as found:
        assert found.address == f"192.0.2.7:{port}"
        assert [each.getsockname()[0] for each in found.listeners] == ["0.0.0.0"]
    with claimed("0.0.0.0", port) as found:
        assert found.address == f"192.0.2.7:{port}"
    with claimed("127.0.0.1", port) as found:
        assert found.address == f"127.0.0.1:{port}"
    with pytest.raises(ConfigError, match=f"cannot listen on 192.0.2.8:{port} for metrics"):
        claim(ServeOptions(metrics_host="192.0.2.8", metrics_port=port), NATS)


async def test_pages_are_served_from_the_first_connection_on() -> None:
    with claimed(port=free_ports(1)[0]) as port:
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


async def test_a_page_that_fails_is_no_end(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> bytes:
        raise RuntimeError("broken")

    with claimed(port=free_ports(1)[0]) as port:
        serving = asyncio.create_task(serve(port, {METRICS: fail, TARGETS: pages("Worker")[TARGETS]}))
        async with httpx.AsyncClient(trust_env=False) as http:
            assert (await http.get(port.url)).status_code == 500
            assert (await http.get(f"{port.url}/targets")).status_code == 200
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
    assert "/metrics cannot be told" in caplog.text


# -- the processes


async def test_a_process_answers_on_its_socket(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = path_of(run_dir, "VllmWorker:1")
    assert await ask(path, METRICS) == b""  # nobody is there
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


async def test_half_a_page_is_none(run_dir: Path) -> None:
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"1000\n# HELP a A.\n# TYPE a gau")
        writer.close()

    async with await asyncio.start_unix_server(die, run_dir / "killed"):
        assert await ask(run_dir / "killed", METRICS) == b""


async def test_a_path_that_is_too_long_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with answering(tmp_path / ("x" * 120), pages("Worker")):
        assert "the metrics port does not show this process" in caplog.text


async def test_a_host_shows_who_is_up(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One answers, one hangs, one is not ready, one is gone."""
    monkeypatch.setattr(metrics_socket, "ASK_S", 0.5)

    def state(service: str, worker: int, *, ready: bool, restarts: int = 0) -> ProcessState:
        return ProcessState(ProcessSpec(service, worker, (), {}, "/", 2), ready, restarts)

    processes = [
        state("Processor", 1, ready=True, restarts=1),
        state("Processor", 2, ready=True),
        state("VllmWorker", 1, ready=False),
        state("VllmWorker", 2, ready=True, restarts=3),
    ]
    host = HostMetrics(run_dir, "10.0.0.9:9091", lambda: processes)
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
