"""One run of one process of the graph, as the supervisor sees it: from the fork until it is reaped.

The process gets a session of its own, dies with the supervisor (PR_SET_PDEATHSIG), and has two pipes to it:

* standard output and error: every line goes to `<logs>/<name>.log` and to the console;
* status, the descriptor in `DYNAMO_STATUS_FD`: JSON lines `{"event": ...}`, where the event is one of
  `progress` (text), `ready` (text, lease, url), `failed` (error, hint), `draining`; others are ignored.
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dynamo.launcher import guard
from dynamo.launcher.console import Console

log = logging.getLogger(__name__)

LINE_BYTES = 64 * 1024  # a longer line is cut into pieces
TAIL_LINES = 40  # kept of the output
OUTPUT_PAUSE_S = 0.02  # between two looks at the output: a busy process writes a line for each request
LAST_WORDS_BYTES = 1024 * 1024  # read at most of a pipe after the end: a descendant may still be writing
LOG_BYTES = 64 * 1024 * 1024  # a larger log becomes <name>.log.1 and a new one begins
EXIT_POLL_S = 0.05  # where there is no pidfd

Event = dict[str, Any]  # one line of a status pipe
_runs = itertools.count(1)


@dataclass(frozen=True)
class ProcessSpec:
    """One process to run: pure data, made by the plan."""

    service: str
    worker_id: int  # from 1
    argv: tuple[str, ...]
    env: Mapping[str, str]  # added to os.environ
    cwd: str
    of: int = 1  # workers that the service has
    namespace: str = ""

    @property
    def name(self) -> str:
        return self.service if self.of == 1 else f"{self.service}:{self.worker_id}"


class ManagedProcess:
    """Starts the process. Make it in the main thread (PR_SET_PDEATHSIG is bound to it), inside an event loop.

    OSError: the program or its directory is not there. `on_event` is called with each event of the status pipe.
    `close` it, which kills what still lives.
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
        self.told_to_stop = False
        self.reloading = False  # ends because its files changed
        self._console = console
        self._on_event = on_event
        self._ended = asyncio.Event()
        with contextlib.ExitStack() as opened:
            self._log = opened.enter_context(_Log(log_path))
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
        self._output = _Lines(output, self._take_output, OUTPUT_PAUSE_S)
        self._status = _Lines(status, self._take_status)
        loop = asyncio.get_running_loop()
        self._pidfd = os.pidfd_open(self.pid) if hasattr(os, "pidfd_open") else -1
        if self._pidfd >= 0:
            loop.add_reader(self._pidfd, self._reap)
        else:
            loop.call_later(EXIT_POLL_S, self._poll)

    @property
    def lives(self) -> bool:
        return not self._ended.is_set()

    @property
    def exit_code(self) -> int | None:
        """-n: ended by signal n. None: lives, or does not go."""
        return self._process.returncode

    def age_s(self) -> float:
        return time.monotonic() - self.started_at

    async def ended(self) -> None:
        """Returns when the process is reaped and all that it wrote was read."""
        await self._ended.wait()

    def signal(self, sig: signal.Signals) -> None:
        """Nothing happens if the process has ended. SIGKILL is given up after `guard.KILL_LIMIT_S`."""
        if self.lives:
            guard.kill(self.pid, sig)
            if sig == signal.SIGKILL:
                asyncio.get_running_loop().call_later(guard.KILL_LIMIT_S, self._ended.set)

    def how_it_ended(self) -> str:
        """`died (SIGKILL)`, `exited (3)`."""
        code = self.exit_code
        if code is None:
            return "hangs (SIGKILL had no effect)"
        return f"exited ({code})" if code >= 0 else f"died ({_signal_name(-code)})"

    def close(self) -> None:
        """Kill it if it lives, and let go of its pipes and its log. May be called twice."""
        if self.lives:
            guard.kill(self.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(guard.GRACE_S)
            self._ended.set()
        self._forget_pidfd()
        self._output.close()
        self._status.close()
        self._log.close()

    def _reap(self) -> None:
        if self._process.poll() is not None:
            self._forget_pidfd()
            self._status.pump(LAST_WORDS_BYTES)
            self._output.pump(LAST_WORDS_BYTES)
            self._ended.set()

    def _poll(self) -> None:
        self._reap()
        if self.lives:
            asyncio.get_running_loop().call_later(EXIT_POLL_S, self._poll)

    def _forget_pidfd(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _take_output(self, lines: Sequence[bytes]) -> None:
        self._log.write(lines)
        for line in lines:
            text = line.rpartition(b"\r")[2].decode(errors="replace")  # a progress bar as it last was
            self.tail.append(text)
            self._console.output(text, self.spec.name)

    def _take_status(self, lines: Sequence[bytes]) -> None:
        self._output.pump(LINE_BYTES)  # what it said before
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if isinstance(event, dict):
                self._on_event(self, event)
            else:
                log.warning("%s wrote to its status pipe what is not an event: %.100r", self.spec.name, line)


class _Lines:
    """Reads a pipe as it fills and hands over its lines, without their ends and of at most LINE_BYTES.

    After each look it waits `pause_s`, unless the pipe was full: a look costs more than the lines.
    """

    def __init__(self, fd: int, take: Callable[[Sequence[bytes]], None], pause_s: float = 0.0) -> None:
        self._fd = fd
        self._take = take
        self._pause_s = pause_s
        self._rest = b""
        self._open = True
        self._loop = asyncio.get_running_loop()
        os.set_blocking(fd, False)
        self._watch()

    def _watch(self) -> None:
        if self._open:
            self._loop.add_reader(self._fd, self._look)

    def _look(self) -> None:
        if self.pump(1) < LINE_BYTES and self._pause_s and self._open:
            self._loop.remove_reader(self._fd)
            self._loop.call_later(self._pause_s, self._watch)

    def pump(self, limit_bytes: int) -> int:
        """Read what is there; stop after `limit_bytes` or a little more. Returns how many bytes that was."""
        size = 0
        while self._open and size < limit_bytes:
            try:
                data = os.read(self._fd, LINE_BYTES)
            except BlockingIOError:
                break
            if not data:
                self.close()
                break
            size += len(data)
            *lines, self._rest = (self._rest + data).split(b"\n")
            pieces = [piece for line in lines for piece in _pieces(line.removesuffix(b"\r"))]
            while len(self._rest) >= LINE_BYTES:
                pieces.append(self._rest[:LINE_BYTES])
                self._rest = self._rest[LINE_BYTES:]
            self._take(pieces)
        return size

    def close(self) -> None:
        if self._open:
            self._open = False
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            if self._rest:
                self._take([self._rest])


def _pieces(line: bytes) -> Iterable[bytes]:
    return (line[start : start + LINE_BYTES] for start in range(0, len(line) or 1, LINE_BYTES))


class _Log:
    """A log file that is moved aside when it is full, and that a full disk only silences."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._size = self._file.tell()

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, lines: Sequence[bytes]) -> None:
        if not lines:
            return
        with contextlib.suppress(OSError, ValueError):  # closed, where no new one could be opened
            self._size += self._file.write(b"\n".join([*lines, b""]))
            if self._size > LOG_BYTES:
                self._file.close()
                os.replace(self._path, f"{self._path}.1")
                self._file, self._size = self._path.open("ab", buffering=0), 0

    def close(self) -> None:
        self._file.close()


def _pipe(opened: contextlib.ExitStack) -> tuple[int, int]:
    ends = os.pipe()
    for fd in ends:
        opened.callback(os.close, fd)
    return ends


def _after_fork(supervisor_pid: int) -> None:
    guard.die_with_parent(signal.SIGKILL, supervisor_pid)
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)  # the guard's child ignores it; that would be inherited


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
