"""Processes under measurement: start them with a log file, read their CPU time, stop them. Linux only."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

STOP_S = 15.0


class StartError(Exception):
    """A server did not start; the end of its output is in the message."""


def free_port(count: int = 1) -> int:
    """Return the first of `count` consecutive free ports, below the kernel's range for outgoing connections."""
    while True:
        first = random.randrange(18000, 32000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for port in range(first, first + count):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


def cpu_ns(pid: int) -> int:
    """Return the user and system time of a process and its threads, ended ones included.

    Read from its CPU clock, which is exact where /proc counts ticks.
    """
    return time.clock_gettime_ns((~pid << 3) | 2)  # Linux's number of another process's CPU clock


def descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
                children.setdefault(int(fields[1]), []).append(int(entry))
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += children.get(pid, [])
    return found


def command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


class Process:
    """A running program whose output goes to a file."""

    def __init__(self, argv: Sequence[str | Path], log: Path, env: Mapping[str, str], cwd: Path) -> None:
        self.log = log
        self.started = time.perf_counter()
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [str(a) for a in argv], stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=cwd,
                env={**os.environ, **env},
            )  # fmt: skip
        self.pid = self._process.pid

    def wait_for(self, ready: Callable[[], bool], limit_s: float, what: str) -> float:
        """Wait until `ready()` and return the seconds since the start.

        Raises StartError if the process ends or the limit is over.
        """
        while not ready():
            if self._process.poll() is not None or time.perf_counter() - self.started > limit_s:
                raise StartError(f"{what} did not start:\n{self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.005)
        return time.perf_counter() - self.started

    def stop(self) -> None:
        """Send SIGTERM; if the process does not end, send SIGKILL to it and its descendants."""
        if self._process.poll() is not None:
            return
        pids = descendants(self.pid)
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait()


class CpuMeter:
    """CPU time of the descendants of some processes, by role."""

    def __init__(self, roots: Sequence[int], role: Callable[[list[str]], str]) -> None:
        self.pids = {pid: role(command_line(pid)) for root in roots for pid in descendants(root)}
        self._before: dict[int, int] = {}

    def start(self) -> None:
        self._before = {pid: cpu_ns(pid) for pid in self.pids}

    def seconds(self) -> dict[str, float]:
        """Return the CPU time since `start` by role. Raises OSError if one of the processes has ended."""
        used = dict.fromkeys(self.pids.values(), 0.0)
        for pid, role in self.pids.items():
            used[role] += (cpu_ns(pid) - self._before[pid]) / 1e9
        return used
