"""CPU time and memory of a process with its descendants: real ones, which work, end and are started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo.launcher import guard, process_usage
from dynamo.launcher.process_usage import ProcessUsage

WORK_S, LIMIT_S, TICK_S = 0.3, 30, 0.02
PARENT = f"""
import os, time
child = os.fork()
if not child:
    kept = b"x" * (64 << 20)
    while time.process_time() < {WORK_S}:
        pass
    print("worked", flush=True)
    time.sleep({LIMIT_S})
    os._exit(0)
os.waitpid(child, 0)
print("waited", flush=True)
time.sleep({LIMIT_S})
"""


@contextmanager
def parent() -> Iterator[subprocess.Popen[str]]:
    """A process whose child has worked."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "worked\n"
            yield process
        finally:
            for pid in (*guard.descendants(process.pid), process.pid):
                guard.kill(pid, signal.SIGKILL)


def test_what_a_child_uses_counts_and_stays() -> None:
    trees = ProcessUsage()
    with parent() as process:
        first = trees.look({"Worker": process.pid, "Processor": None})
        assert first["Worker"].cpu_s >= WORK_S - TICK_S
        assert first["Worker"].resident_bytes > 64 << 20
        assert first["Processor"] == (0, 0)
        (child,) = guard.children(process.pid)
        os.kill(child, signal.SIGTERM)
        assert process.stdout is not None
        assert process.stdout.readline() == "waited\n"
        second = trees.look({"Worker": process.pid})["Worker"]
        assert second.cpu_s >= first["Worker"].cpu_s
        assert second.resident_bytes < 64 << 20
    ended = trees.look({"Worker": None})["Worker"]
    assert (ended.cpu_s, ended.resident_bytes) == (second.cpu_s, 0)
    with parent() as process:  # started again
        assert trees.look({"Worker": process.pid})["Worker"].cpu_s >= ended.cpu_s + WORK_S - TICK_S


tables = st.dictionaries(st.integers(2, 9), st.tuples(st.integers(0, 8), *[st.integers(0, 5)] * 3), max_size=8)


@given(st.lists(st.tuples(st.sampled_from([None, *range(1, 10)]), tables), max_size=8))
def test_whatever_comes_and_goes_cpu_time_never_falls(
    looks: list[tuple[int | None, dict[int, tuple[int, int, int, int]]]],
) -> None:
    trees, last = ProcessUsage(), 0.0
    for root, table in looks:
        found = [
            process_usage._Process(pid, min(parent, pid - 1), *rest) for pid, (parent, *rest) in sorted(table.items())
        ]
        members = {root}
        for process in found:  # parents have smaller numbers here
            members |= {process.pid} if process.parent in members and root in table else set()
        with mock.patch.object(process_usage, "_processes", lambda found=found: found):
            told = trees.look({"Worker": root})
        assert bool(told) == bool(found)
        for used in told.values():
            pages = sum(process.pages for process in found if process.pid in members)
            assert used.resident_bytes == pages * os.sysconf("SC_PAGE_SIZE")
            assert used.cpu_s >= last
            last = used.cpu_s


@pytest.mark.parametrize("pid", [2**31 - 1, 0])
def test_a_process_that_is_gone_uses_nothing(pid: int) -> None:
    assert ProcessUsage().look({"Worker": pid}) == {"Worker": (0, 0)}
