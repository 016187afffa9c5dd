"""What processes of a graph leave behind when they die: descendants, which become children of the supervisor.

`DYNAMO_PROCESS` in the environment, which descendants inherit, tells them from daemons of processes that live.
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

LEFTOVER_S = 5.0  # those that will not go are given up after this


class Orphans:
    """Of the children of this process, except those that exist when this is made. `living` and `spare` as `Supervisor`
    knows them: children that it started, and pids of those that others started."""

    def __init__(self, living: Callable[[], Sequence[ManagedProcess]], spare: Callable[[], Collection[int]]) -> None:
        self._living, self._spare = living, spare
        self._not_mine = set(guard.children(os.getpid()))

    def find(self) -> list[int]:
        """Children of this process that nobody living here started, or whose ancestor did. Those that ended are reaped.

        One whose environment cannot be read (vLLM's core writes its title over it) counts as left over.
        """
        living = self._living()
        known = {child.pid for child in living} | self._not_mine | set(self._spare())
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
        started = time.monotonic()
        while left := self.find():
            since_s = time.monotonic() - started
            if since_s > LEFTOVER_S:
                log.warning("processes %s do not end after SIGKILL", left)
                return
            guard.kill_all((*guard.descendants(*left), *left), since_s)
            await asyncio.sleep(0.01)

    def sweep(self) -> None:
        """The last look, without awaiting: this may run while the task is being cancelled."""
        started = time.monotonic()
        while (left := self.find()) and (since_s := time.monotonic() - started) < LEFTOVER_S:
            guard.kill_all((*guard.descendants(*left), *left), since_s)
            time.sleep(0.01)
