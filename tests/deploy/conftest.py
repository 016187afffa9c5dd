"""Prometheus, and a graph for it that does all that the dashboards show."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.graph.test_disagg import ask, prompt
from tests.graph.test_migration import streams
from tests.ports import free_port
from tests.served import Served


class BusyGraph:
    """graphs.disagg_router with mock engines. `metrics`: host and port that Prometheus scrapes."""

    def __init__(self, log: Path) -> None:
        port = free_port()
        self.metrics = f"127.0.0.1:{port}"
        options = (
            "-f",
            "configs/disagg_router_mock.yaml",
            "--VllmWorker.ServiceArgs.workers=2",
            f"--metrics-port={port}",
        )
        self.served = Served(log, *options, graph="graphs.disagg_router:Frontend")

    def work(self, meanwhile: Callable[[], None] | None = None) -> None:
        """32 streams with short prompts, and then prompts that PrefillWorkers compute, one that is known, and an error."""
        assert len(streams(self.served, 60, meanwhile)) == 32

        async def long() -> None:
            async with httpx.AsyncClient() as client:
                for tokens in (prompt(), prompt(), known):
                    await ask(self.served, client, tokens)
                await client.post(f"{self.served.url}/v1/completions", json={"model": "no-model", "prompt": "hello"})

        known = prompt(500)
        asyncio.run(long())

    def lose_a_worker(self) -> None:
        """Its requests go on elsewhere, and it is started again."""
        os.kill(self.served.pids("--service-name VllmWorker")[0], signal.SIGKILL)


@pytest.fixture(scope="session")
def busy_graph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BusyGraph]:
    """Tests that use it are a group in tests/parallel.py."""
    graph = BusyGraph(tmp_path_factory.mktemp("busy") / "output")
    try:
        graph.served.ready()
        graph.work(graph.lose_a_worker)
        yield graph
    finally:
        graph.served.end()


@pytest.fixture(scope="session")
def prometheus() -> Path:
    """The directory of `prometheus` and `promtool`."""
    script, cache = Path(__file__).with_name("prometheus.sh"), Path(sys.prefix) / "share" / "prometheus"
    ran = subprocess.run(["bash", script, cache], capture_output=True, text=True, timeout=100)
    if ran.returncode == 3:
        pytest.skip(ran.stderr.strip())
    assert ran.returncode == 0, ran.stderr
    return Path(ran.stdout.strip())
