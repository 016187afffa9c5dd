"""Run commands as users do: with pipes, or in a terminal (a pty) in which Ctrl-C is a key."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "dynamo")
CTRL_C, CTRL_D = "\x03", "\x04"


def environment(**env: str) -> dict[str, str]:
    """Return the environment of this process, without the variables that configure the commands, and with `env`."""
    steering = ("DYN", "NO_COLOR", "NATS_SERVER", "ETCD_ENDPOINTS")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(steering)}
    return {**kept, "PYTHONPATH": str(ROOT), **env}


def command(
    *arguments: str, stdin: str = "", cwd: Path = ROOT, timeout_s: float = 60, **env: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        input=stdin,
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *arguments: str, cwd: Path = ROOT, **env: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=cwd,
            env=environment(**{"TERM": "dumb", "NO_COLOR": "1"} | env),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.output = ""
        self._read_to = 0

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str, timeout_s: float = 30) -> str:
        """Return the output since the last wait, up to and including `text`."""
        deadline = time.monotonic() + timeout_s
        while (at := self.output.find(text, self._read_to)) < 0:
            assert self._read(deadline), f"no {text!r} in {self.output!r}"
        begin = self._read_to
        self._read_to = at + len(text)
        return self.output[begin : self._read_to]

    def wait(self, timeout_s: float = 30) -> int:
        """Wait for the exit code, and check that no process of its session is left."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.output
            self._read(time.monotonic() + 0.05)
        while self._read(time.monotonic() + 0.05):
            pass
        assert self.others() == []
        return self.process.returncode

    def others(self) -> list[int]:
        """Return the other processes of its session, zombies excepted."""
        found = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                state, _, _, session = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) == self.process.pid != int(entry) and state != "Z":
                found.append(int(entry))
        return found

    def close(self) -> None:
        for pid in [*self.others(), *([self.process.pid] if self.process.poll() is None else [])]:
            os.kill(pid, 9)
        self.process.wait()
        os.close(self._master)

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # the other side is closed
            return False
        self.output += data.decode(errors="replace")
        return bool(data)
