"""One run of one process of the graph, as the supervisor sees it: from the fork until it is reaped.

The process gets a session of its own, dies with the supervisor (PR_SET_PDEATHSIG), and has two pipes to it:

* standard output and error: every line goes to `<logs>/<name>.log` and to the console;
* status, the descriptor in `DYNAMO_STATUS_FD`: JSON lines `{"event": ...}`, where the event is one of
  `progress` (text), `ready` (text, lease, url, files), `failed` (error, hint), `draining`; others are ignored.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dynamo import prctl
from dynamo.launcher import guard
from dynamo.launcher.console import Console
from dynamo.launcher.process_output import LINE_BYTES, LineReader, RotatingLog

log = logging.getLogger(__name__)

TAIL_LINES = 40  # of the output, kept for error messages
OUTPUT_PAUSE_S = 0.02  # between two reads of the output: a busy process writes a line for each request
FINAL_READ_BYTES = 1024 * 1024  # read at most from a pipe after the end: a descendant may still be writing
EXIT_POLL_S = 0.05  # where there is no pidfd
GRACE_S = 1.0  # between SIGTERM and SIGKILL where nothing has to be drained

Event = dict[str, Any]
"""One line of a status pipe."""
_runs = itertools.count(1)


@dataclass(frozen=True)
class ProcessSpec:
    """One process to run: pure data, made by the plan."""

    service: str
    worker_id: int  # from 1
    argv: tuple[str, ...]
    env: Mapping[str, str]  # added to os.environ
    cwd: str
    workers: int = 1  # of the service
    namespace: str = ""

    @property
    def name(self) -> str:
        return self.service if self.workers == 1 else f"{self.service}:{self.worker_id}"


class ManagedProcess:
    """A started process. Create it in the main thread (PR_SET_PDEATHSIG is bound to it), inside an event loop.

    Raises OSError if the program or its directory does not exist. `on_event` is called with each event of the status
    pipe. `close` kills the process if it is still alive.
    """

    def __init__(
        self, spec: ProcessSpec, log_path: Path, console: Console, on_event: Callable[[ManagedProcess, Event], None]
    ) -> None:
        self.spec = spec
        self.log_path = log_path
        self.mark = f"{os.getpid()}/{next(_runs)}/{spec.name}"  # in the environment of all its descendants
        self.started_at = time.monotonic()
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.ready: Event = {}  # the last `ready` event
        self.progress = ""
        self.error = ""
        self.hint = ""
        self.draining = False  # it was sent SIGTERM to finish its requests
        self.reloading = False  # it ends because its files changed
        self._console = console
        self._on_event = on_event
        self._ended = asyncio.Event()
        with contextlib.ExitStack() as opened:
            self._log = opened.enter_context(RotatingLog(log_path))
            output, output_w = _pipe(opened)
            status, status_w = _pipe(opened)
            self._process = subprocess.Popen(
                spec.argv,
                cwd=spec.cwd,
                env={
                    "PYTHONUNBUFFERED": "1",  # what it prints before it dies must arrive
                    **os.environ,
                    **spec.env,
                    "DYNAMO_PROCESS": self.mark,
                    "DYNAMO_STATUS_FD": str(status_w),
                },
                stdin=subprocess.DEVNULL,
                stdout=output_w,
                stderr=output_w,
                pass_fds=(status_w,),
                start_new_session=True,
                preexec_fn=partial(_after_fork, os.getpid()),  # two system calls: safe beside the console's thread
            )
            opened.pop_all()
        os.close(output_w)
        os.close(status_w)
        self.pid = self._process.pid
        self._output = LineReader(output, self._on_output, OUTPUT_PAUSE_S)
        self._status = LineReader(status, self._on_status)
        loop = asyncio.get_running_loop()
        self._pidfd = os.pidfd_open(self.pid) if hasattr(os, "pidfd_open") else -1
        if self._pidfd >= 0:
            loop.add_reader(self._pidfd, self._reap)
        else:
            loop.call_later(EXIT_POLL_S, self._poll)

    @property
    def alive(self) -> bool:
        return not self._ended.is_set()

    @property
    def exit_code(self) -> int | None:
        """-n: ended by signal n. None: alive, or SIGKILL had no effect."""
        return self._process.returncode

    def age_s(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.started_at

    async def wait(self) -> None:
        """Wait until the process is reaped and all its output has been read."""
        await self._ended.wait()

    def signal(self, sig: signal.Signals) -> None:
        """Send a signal; no-op if the process has ended. SIGKILL is given up after `guard.KILL_LIMIT_S`."""
        if self.alive:
            guard.kill(self.pid, sig)
            if sig == signal.SIGKILL:
                asyncio.get_running_loop().call_later(guard.KILL_LIMIT_S, self._ended.set)

    def exit_reason(self) -> str:
        """Describe how the process ended: `died (SIGKILL)`, `exited (3)`."""
        code = self.exit_code
        if code is None:
            return "hangs (SIGKILL had no effect)"
        return f"exited ({code})" if code >= 0 else f"died ({_signal_name(-code)})"

    def close(self) -> None:
        """Kill the process if it is alive, and close its pipes and its log. May be called twice."""
        if self.alive:
            guard.kill(self.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(guard.GRACE_S)
            self._ended.set()
        self._close_pidfd()
        self._output.close()
        self._status.close()
        self._log.close()

    def _reap(self) -> None:
        if self._process.poll() is not None:
            self._close_pidfd()
            self._status.read(FINAL_READ_BYTES)
            self._output.read(FINAL_READ_BYTES)
            self._ended.set()

    def _poll(self) -> None:
        self._reap()
        if self.alive:
            asyncio.get_running_loop().call_later(EXIT_POLL_S, self._poll)

    def _close_pidfd(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _on_output(self, lines: Sequence[bytes]) -> None:
        self._log.write(lines)
        for line in lines:
            text = line.rpartition(b"\r")[2].decode(errors="replace")  # the last state of a progress bar
            self.tail.append(text)
            self._console.output(text, self.spec.name)

    def _on_status(self, lines: Sequence[bytes]) -> None:
        self._output.read(LINE_BYTES)  # first the output written before the event
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if isinstance(event, dict):
                self._on_event(self, event)
            else:
                log.warning("ignored a line on the status pipe of %s: not an event: %.100r", self.spec.name, line)


def _pipe(opened: contextlib.ExitStack) -> tuple[int, int]:
    ends = os.pipe()
    for fd in ends:
        opened.callback(os.close, fd)
    return ends


def _after_fork(supervisor_pid: int) -> None:
    prctl.die_with_parent(signal.SIGKILL, supervisor_pid)
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)  # ignored in the supervisor; the child would inherit that


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


async def end_processes(processes: Sequence[ManagedProcess]) -> None:
    """Send SIGTERM, then SIGKILL after `GRACE_S` to what is left, and wait until all have ended."""
    for process in processes:
        process.signal(signal.SIGTERM)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(GRACE_S):
            for process in processes:
                await process.wait()
    for process in processes:
        process.signal(signal.SIGKILL)
    for process in processes:
        await process.wait()
