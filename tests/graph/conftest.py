"""A graph under `dynamo serve`, as a user starts it: a subprocess with its terminal output, driven over HTTP."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from dynamo.launcher.embedded_servers import free_ports

ROOT = Path(__file__).parents[2]
READY = re.compile(r"^ready in .*: (http://\S+)$", re.MULTILINE)


class Served:
    """`dynamo serve` with its output in a file. Its processes are known by the run directory in their environment."""

    def __init__(self, log: Path, *arguments: str, graph: str = "graphs.agg:Frontend", cwd: Path = ROOT) -> None:
        self.port = free_ports(1, range(10000, 20000))[0]  # not one that the graph may take for something else
        self.log = log
        command = [sys.executable, "-m", "dynamo", "serve", graph, "--infra", "embedded", "--port", str(self.port)]
        self.started = time.monotonic()
        self._seen: set[int] = set()
        with log.open("wb") as output:
            self.process = subprocess.Popen([*command, *arguments], cwd=cwd, stdout=output, stderr=output)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str | re.Pattern[str], timeout_s: float, *, after: int = 0) -> float:
        """Seconds since the start until the output (from character `after` on) has `text`."""
        pattern = re.compile(re.escape(text)) if isinstance(text, str) else text
        deadline = time.monotonic() + timeout_s
        while not pattern.search(self.output, after):
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {pattern.pattern!r} in {timeout_s} s:\n{self.output}"
            time.sleep(0.02)
        return time.monotonic() - self.started

    def ready(self, timeout_s: float = 60) -> Served:
        self.wait_for(READY, timeout_s)
        return self

    @property
    def run_dir(self) -> str:
        found = re.search(r" in (/\S+/dynamo-\w+)", self.output)
        assert found, self.output
        return found[1]

    def processes(self) -> dict[int, str]:
        """pid -> command line of everything that belongs to this graph: below `dynamo serve`, or of its environment.

        Both, since orphans have another parent, and vLLM's engine core overwrites its environment with its title.
        """
        mark = self.run_dir.encode()
        commands, parents, found = {}, {}, {self.process.pid, *self._seen}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            pid = int(entry.name)
            try:
                command = (entry / "cmdline").read_bytes()
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                if not command or stat[0] == "Z":
                    continue
                commands[pid], parents[pid] = command.replace(b"\0", b" ").decode(errors="replace"), int(stat[1])
                if mark in command or mark in (entry / "environ").read_bytes():
                    found.add(pid)
            except OSError:
                continue
        size = 0
        while size != len(found):
            size = len(found)
            found |= {pid for pid, parent in parents.items() if parent in found}
        self._seen |= {pid for pid in found if pid in commands and pid != self.process.pid}
        return {pid: commands[pid] for pid in found if pid in commands and pid != self.process.pid}

    def pids(self, what: str) -> list[int]:
        return [pid for pid, command in self.processes().items() if what in command]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait, and see that nothing is left two seconds later at the most."""
        assert self.processes()
        self.process.send_signal(number)
        code = self.process.wait(40)
        deadline = time.monotonic() + 2
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not self.processes()
        return code


@pytest.fixture(scope="session")
def serve_graph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def start(*arguments: str, **options: object) -> Served:
        log = tmp_path_factory.mktemp("serve") / "output"
        served = Served(log, *arguments, **options)  # type: ignore[arg-type]
        started.append(served)
        return served

    yield start
    for served in started:
        if served.process.poll() is None:
            served.process.send_signal(signal.SIGTERM)
            try:
                served.process.wait(30)
            except subprocess.TimeoutExpired:
                os.kill(served.process.pid, signal.SIGKILL)
                served.process.wait()


@pytest.fixture(scope="session")
def mock_graph(serve_graph: Callable[..., Served]) -> Served:
    """graphs.agg with two mock workers, for tests that leave it as it was."""
    return serve_graph("-f", "configs/agg_mock.yaml", "--VllmWorker.ServiceArgs.workers=2").ready()


@pytest.fixture(scope="session")
def tiny_graph(serve_graph: Callable[..., Served]) -> Served:
    """What `make serve` runs: real vLLM on the CPU."""
    return serve_graph("-f", "configs/agg_tiny.yaml").ready(120)
