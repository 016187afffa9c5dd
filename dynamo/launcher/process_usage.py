"""CPU time and memory of processes with all that they started: vLLM's engine core, which does the work, is a child.

Read from /proc when it is asked for: 30 µs a process of the machine. Elsewhere than on Linux nothing is found.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple


class Usage(NamedTuple):
    """`resident_bytes`: a page that several processes share counts for each of them."""

    cpu_s: float
    resident_bytes: int


class _Process(NamedTuple):
    pid: int
    parent: int
    started: int
    ticks: int
    """of CPU time, its own and of the children that it has waited for"""
    pages: int


class ProcessUsage:
    """CPU time never falls: what a process used stays in its sum when it ends, and when it is started again.

    What a descendant uses between the last look and its end counts where its parent waits for it.
    """

    def __init__(self) -> None:
        self._used: dict[str, int] = defaultdict(int)
        self._last: dict[str, tuple[tuple[int, int], int]] = {}  # pid and start of the root, ticks of its tree

    def look(self, roots: Mapping[str, int | None]) -> dict[str, Usage]:
        """By name: the process of this pid and its descendants; None: it does not run. Empty off Linux."""
        children: dict[int, list[_Process]] = defaultdict(list)
        processes = {process.pid: process for process in _processes()}
        for process in processes.values():
            children[process.parent].append(process)
        return {name: self._usage(name, processes.get(pid or 0), children) for name, pid in roots.items() if processes}

    def _usage(self, name: str, root: _Process | None, children: Mapping[int, list[_Process]]) -> Usage:
        tree = [root] if root is not None else []
        for process in tree:  # grows while it is walked
            tree += children.get(process.pid, ())
        if root is not None:
            run, ticks = (root.pid, root.started), sum(process.ticks for process in tree)
            last_run, last = self._last.get(name, (run, 0))
            self._used[name] += max(ticks - (last if run == last_run else 0), 0)
            self._last[name] = run, ticks
        pages = sum(process.pages for process in tree)
        return Usage(self._used[name] / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE"))


def _processes() -> list[_Process]:
    found = []
    with contextlib.suppress(OSError):
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{entry}/stat", "rb") as stat:
                # after "pid (any text)": proc(5) counts these fields from 3
                fields = stat.read().rpartition(b")")[2].split()
                parent, started, pages = (int(fields[number - 3]) for number in (4, 22, 24))
                found.append(_Process(int(entry), parent, started, sum(map(int, fields[11:15])), pages))
    return found
