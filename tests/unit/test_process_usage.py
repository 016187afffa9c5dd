"""CPU time and memory of a process with its descendants: real ones that work, end and are started again."""

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
PAGE_BYTES = 4096
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
    """Yield a process whose child has used `WORK_S` of CPU time."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "worked\n"
            yield process
        finally:
            for pid in (*guard.descendants(process.pid), process.pid):
                guard.kill(pid, signal.SIGKILL)


def test_usage_of_a_child_counts_and_is_kept_after_its_end() -> None:
    meter = ProcessUsage()
    with parent() as process:
        first = meter.measure({"Worker": process.pid, "Processor": None})
        assert first["Worker"].cpu_s >= WORK_S - TICK_S
        assert first["Worker"].resident_bytes > 64 << 20
        assert first["Processor"] == (0, 0)
        (child,) = guard.children(process.pid)
        os.kill(child, signal.SIGTERM)
        assert process.stdout is not None
        assert process.stdout.readline() == "waited\n"
        second = meter.measure({"Worker": process.pid})["Worker"]
        assert second.cpu_s >= first["Worker"].cpu_s
        assert second.resident_bytes < 64 << 20
    ended = meter.measure({"Worker": None})["Worker"]
    assert (ended.cpu_s, ended.resident_bytes) == (second.cpu_s, 0)
    with parent() as process:  # started again
        assert meter.measure({"Worker": process.pid})["Worker"].cpu_s >= ended.cpu_s + WORK_S - TICK_S


tables = st.dictionaries(st.integers(2, 9), st.tuples(st.integers(0, 8), *[st.integers(0, 5)] * 3), max_size=8)


@given(st.lists(st.tuples(st.sampled_from([None, *range(1, 10)]), tables), max_size=8))
def test_cpu_time_never_falls(
    looks: list[tuple[int | None, dict[int, tuple[int, int, int, int]]]],
) -> None:
    meter, last = ProcessUsage(), 0.0
    for root, table in looks:
        found = [
            process_usage._Process(pid, min(parent, pid - 1), started, cpu_s, pages * PAGE_BYTES)
            for pid, (parent, started, cpu_s, pages) in sorted(table.items())
        ]
        members = {root}
        for process in found:  # parents have smaller numbers here
            members |= {process.pid} if process.parent in members and root in table else set()
        with mock.patch.object(process_usage, "_processes", lambda found=found: found):
            usage = meter.measure({"Worker": root})
        assert bool(usage) == bool(found)
        for used in usage.values():
            resident_bytes = sum(process.resident_bytes for process in found if process.pid in members)
            assert used.resident_bytes == resident_bytes
            assert used.cpu_s >= last
            last = used.cpu_s


@pytest.mark.parametrize("pid", [2**31 - 1, 0])
def test_a_process_that_has_ended_uses_nothing(pid: int) -> None:
    assert ProcessUsage().measure({"Worker": pid}) == {"Worker": (0, 0)}
