"""A graph under `dynamo serve`, as a user starts it: a subprocess with its terminal output, driven over HTTP."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tests.ports import free_port

if TYPE_CHECKING:
    import openai

ROOT = Path(__file__).parents[1]
READY = re.compile(r"^ready in .*: (http://\S+)$", re.MULTILINE)


Start = Callable[..., "Served"]


class Served:
    """`dynamo serve` with its output in a file. Its processes are known by the run directory in their environment."""

    def __init__(
        self,
        log: Path,
        *arguments: str,
        graph: str = "graphs.agg:Frontend",
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self.log = log
        command = [sys.executable, "-m", "dynamo", "serve", graph, "--infra", "embedded", "--port", str(self.port)]
        self.started = time.monotonic()
        self._seen: set[int] = set()
        with log.open("wb") as output:
            self.process = subprocess.Popen([*command, *arguments], cwd=cwd, env=env, stdout=output, stderr=output)

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

    @property
    def servers(self) -> dict[str, str]:
        """NATS_SERVER and ETCD_ENDPOINTS of this graph, for commands that work on it."""
        found = re.search(r"nats (\S+), etcd (\S+) in", self.output)
        assert found, self.output
        return {"NATS_SERVER": f"nats://{found[1]}", "ETCD_ENDPOINTS": f"http://{found[2]}"}

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
        import openai  # a second of CPU time, in the tests that need it

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

    def end(self) -> None:
        """Stop it if it still runs, with SIGKILL after 30 s."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def until(condition: Callable[[], bool], what: str, timeout_s: float = 20) -> None:
    """Wait until the condition holds; `what` it is, for the failure."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)
