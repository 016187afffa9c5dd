"""The guard with a bare supervisor: exit codes, signals, and no process left, whichever of the two dies first.

Every process of a test has a token in its command line, by which remaining ones are found in /proc.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo.launcher import guard

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process supervision is for Linux")

# An engine core at its worst: own session, ignores what can be ignored, has a child and a double-forked daemon.
STUBBORN = """
import os, signal, subprocess, sys, time
token, level = sys.argv[1], int(sys.argv[2])
os.setsid()
for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(sig, signal.SIG_IGN)
if level:
    subprocess.Popen([sys.executable, "-ISc", os.environ["STUBBORN"], token, str(level - 1)])
elif os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
else:
    os.wait()
time.sleep(60)
"""

DRIVER = """
import os, signal, subprocess, sys, time
from dynamo.launcher.guard import guarded
token, what = sys.argv[1:]

def run():
    print("running", os.getpid(), os.getpgrp(), flush=True)
    if what == "return": return 7
    if what == "exit": raise SystemExit("a line for standard error")
    if what == "bug": raise ValueError("a bug")
    if what == "signal": os.kill(os.getpid(), signal.SIGKILL)
    if what == "read": return len(sys.stdin.read())
    child = subprocess.Popen([sys.executable, "-ISc", os.environ["STUBBORN"], token, "1"])
    print("spawned", flush=True)
    if what == "leave":
        time.sleep(0.5)
        return 0
    time.sleep(60)

sys.exit(guarded(run, lambda name: print("died by", name, file=sys.stderr)))
"""


def alive(token: str) -> list[int]:
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if token.encode() in Path(f"/proc/{entry}/cmdline").read_bytes():  # empty for a zombie
                found.append(int(entry))
        except OSError:
            pass
    return found


def wait_until_ended_s(token: str, limit_s: float = 5.0) -> float:
    start = time.monotonic()
    while alive(token):
        assert time.monotonic() - start < limit_s, f"still alive: {alive(token)}"
        time.sleep(0.01)
    return time.monotonic() - start


@pytest.fixture
def token() -> Iterator[str]:
    token = uuid.uuid4().hex
    yield token
    for pid in alive(token):
        guard.kill(pid, signal.SIGKILL)


def start(token: str, what: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, token, what],
        env={**os.environ, "STUBBORN": STUBBORN},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # pytest may run under nohup
    )


def wait_for_line(process: subprocess.Popen[str], word: str) -> list[str]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return line.split()
    raise AssertionError(f"no line {word!r}")


def wait_for_tree(process: subprocess.Popen[str], token: str) -> None:
    """Guard, supervisor, core, its child, the daemon."""
    wait_for_line(process, "spawned")
    end = time.monotonic() + 5
    while len(alive(token)) != 5 or len(guard.descendants(process.pid)) != 4:
        assert time.monotonic() < end, alive(token)
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("what", "code", "error"),
    [
        ("return", 7, ""),
        ("exit", 1, "a line for standard error\n"),
        ("bug", 1, "ValueError: a bug"),
        ("signal", 137, "died by SIGKILL\n"),
    ],
)
def test_the_exit_code_is_the_supervisors(token: str, what: str, code: int, error: str) -> None:
    process = start(token, what)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == code
    assert error in stderr


def test_the_supervisor_has_no_input_and_its_own_process_group(token: str) -> None:
    process = start(token, "read")
    _, pid, group = wait_for_line(process, "running")
    assert pid == group
    assert process.wait(10) == 0  # standard input is open here, and yet at its end there


def test_processes_left_by_the_supervisor_are_killed(token: str) -> None:
    process = start(token, "leave")
    wait_for_line(process, "spawned")
    assert process.wait(10) == 0
    assert alive(token) == []


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_forwarded(token: str, sig: signal.Signals) -> None:
    process = start(token, "wait")
    wait_for_tree(process, token)
    process.send_signal(sig)
    assert process.wait(10) == 128 + sig
    assert alive(token) == []


def test_kill_9_of_the_supervisor_leaves_no_process(token: str) -> None:
    process = start(token, "wait")
    _, pid, _ = wait_for_line(process, "running")
    wait_for_tree(process, token)
    os.kill(int(pid), signal.SIGKILL)
    assert wait_until_ended_s(token) < 2
    assert process.wait(10) == 137


def test_kill_9_of_the_guard_leaves_no_process(token: str) -> None:
    process = start(token, "wait")
    wait_for_tree(process, token)
    process.kill()
    assert wait_until_ended_s(token) < 2


def test_descendants_are_listed_parents_first(token: str) -> None:
    process = start(token, "wait")
    wait_for_tree(process, token)
    below = guard.descendants(process.pid)
    assert set(below) == set(alive(token)) - {process.pid}
    assert guard.children(process.pid) == below[:1]
    process.terminate()
    process.wait(10)
