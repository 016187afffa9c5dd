"""Orphans: descendants that outlive the graph's process that started them, and become children of the supervisor.

`DYNAMO_PROCESS` in the environment, which descendants inherit, separates them from daemons of living processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from dynamo.launcher import guard
from dynamo.launcher.managed_process import ManagedProcess

log = logging.getLogger(__name__)

KILL_S = 5.0  # orphans that survive SIGKILL for this long are given up


class Orphans:
    """The children of this process that belong to no living process of the graph.

    `living` returns the processes of the graph that are alive, `other_pids` children that something else started.
    Children that exist when this object is created are never orphans.
    """

    def __init__(
        self, living: Callable[[], Sequence[ManagedProcess]], other_pids: Callable[[], Collection[int]]
    ) -> None:
        self._living = living
        self._other_pids = other_pids
        self._earlier = set(guard.children(os.getpid()))

    def find(self) -> list[int]:
        """Return the pids of the orphans; reap those that have ended.

        A child whose environment cannot be read (vLLM's core overwrites it with its title) counts as an orphan.
        """
        living = self._living()
        known = {child.pid for child in living} | self._earlier | set(self._other_pids())
        marks = [f"DYNAMO_PROCESS={child.mark}\0".encode() for child in living]
        found = []
        for pid in guard.children(os.getpid()):
            if pid in known:
                continue
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG)[0] == pid:
                    continue
            environ = b""
            with contextlib.suppress(OSError):
                environ = Path(f"/proc/{pid}/environ").read_bytes()
            if not any(mark in environ for mark in marks):
                found.append(pid)
        return found

    async def kill(self) -> None:
        """Kill the orphans and all below them, and wait until they have ended, at most `KILL_S`."""
        started = time.monotonic()
        while orphans := self.find():
            elapsed_s = time.monotonic() - started
            if elapsed_s > KILL_S:
                log.warning("processes still running %g s after SIGKILL: %s", KILL_S, orphans)
                return
            guard.kill_all((*guard.descendants(*orphans), *orphans), elapsed_s)
            await asyncio.sleep(0.01)

    def kill_now(self) -> None:
        """Kill as `kill` does, but block: for cleanup while the task is being cancelled."""
        started = time.monotonic()
        while (orphans := self.find()) and (elapsed_s := time.monotonic() - started) < KILL_S:
            guard.kill_all((*guard.descendants(*orphans), *orphans), elapsed_s)
            time.sleep(0.01)
