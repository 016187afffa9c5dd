"""CPU time and memory of processes with all their descendants: vLLM's engine core, which does the work, is a child."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple


class Usage(NamedTuple):
    """`resident_bytes`: a page that several processes share counts for each of them."""

    cpu_s: float
    resident_bytes: int


class _Process(NamedTuple):
    """`identity` differs between two processes that had the same pid; `cpu_s` includes children that were waited for."""

    pid: int
    parent: int
    identity: object
    cpu_s: float
    resident_bytes: int


class ProcessUsage:
    """Measures processes by name. CPU time never falls: a process that ends or restarts keeps what it used.

    What a descendant uses between the last measurement and its end counts if its parent waits for it.
    """

    def __init__(self) -> None:
        self._cpu_s: dict[str, float] = defaultdict(float)
        self._last: dict[str, tuple[tuple[int, object], float]] = {}  # run of the root, CPU time of its tree

    def measure(self, roots: Mapping[str, int | None]) -> dict[str, Usage]:
        """Return the usage by name of these pids with their descendants; pid None: not running.

        The pids are this process or descendants of it. Empty if no process can be read.
        """
        children: dict[int, list[_Process]] = defaultdict(list)
        processes = {process.pid: process for process in _processes()}
        for process in processes.values():
            children[process.parent].append(process)
        return {name: self._usage(name, processes.get(pid or 0), children) for name, pid in roots.items() if processes}

    def _usage(self, name: str, root: _Process | None, children: Mapping[int, list[_Process]]) -> Usage:
        tree = [root] if root is not None else []
        for process in tree:  # the list grows during the iteration
            tree += children.get(process.pid, ())
        if root is not None:
            run = root.pid, root.identity
            cpu_s = sum(process.cpu_s for process in tree)
            last_run, last_s = self._last.get(name, (run, 0.0))
            self._cpu_s[name] += max(cpu_s - (last_s if run == last_run else 0.0), 0.0)
            self._last[name] = run, cpu_s
        return Usage(self._cpu_s[name], sum(process.resident_bytes for process in tree))


def _processes() -> list[_Process]:
    """Read this process and its descendants: 25 µs per process of the machine, 40 µs more for each that is read."""
    import psutil  # type: ignore[import-untyped]  # 30 ms: not in the start's way

    this = psutil.Process()
    found = []
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.Error), process.oneshot():
            cpu_s = sum(process.cpu_times()[:4])  # user and system, its own and of children
            resident = process.memory_info().rss
            found.append(_Process(process.pid, process.ppid(), process, cpu_s, resident))  # compared by start time
    return found
