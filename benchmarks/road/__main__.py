"""`python -m benchmarks.road`: count the files and functions of this project that one streaming chat runs through.

Serve graphs.agg on the mock engine, warm it up, then record every Python call in the service processes during one chat
of three tokens. Functions that run on timers (heartbeat, liveness) are recorded first, without a request, and left out;
so are comprehensions, which are functions in Python 3.11 only. The engine's own files are counted apart: with vLLM they
are vLLM's. The smallest of several chats is given.

`--list` prints the functions by file; `--repository DIR` measures another checkout, with its own `.venv`.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
START_LIMIT_S = 60.0
RECORD_LIMIT_S = 10.0
IDLE_S = 2.5
"""Longer than the longest period of a timer that runs while nothing is asked."""
COMPREHENSIONS = ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")
ENGINES = ("dynamo/engines/", "dynamo/llm/engines/")


class Function(NamedTuple):
    """A function by its place; `service` is that of the process it ran in."""

    file: str
    line: int
    name: str


Calls = dict[str, collections.Counter[Function]]
"""service -> how often each function was called"""


def free_port() -> int:
    """Return a TCP port of the loopback interface that is free now, below the ephemeral range."""
    for port in range(21000, 32000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise OSError("no free port")


def children(pid: int) -> list[int]:
    """Return the ids of all descendants of a process."""
    found: list[int] = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = re.search(r"^PPid:\t(\d+)", status.read_text(), re.MULTILINE)
        except OSError:
            continue
        if parent is not None and int(parent.group(1)) == pid:
            found += [int(status.parent.name), *children(int(status.parent.name))]
    return found


def service_processes(pid: int) -> dict[int, str]:
    """Return process id -> service of the service processes below a `dynamo serve`."""
    found = {}
    for child in children(pid):
        words = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
        if "--service-name" in words:
            found[child] = words[words.index("--service-name") + 1]
    return found


def chat(port: int) -> None:
    """Stream one chat of three tokens."""
    body = {"model": "dynamo-tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "stream": True}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode())
    request.add_header("content-type", "application/json")
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert b"[DONE]" in answer.read()


def recorded(repository: Path, services: dict[int, str], directory: Path, act: Callable[[], None]) -> Calls:
    """Return the calls of this project's functions in each service while `act` runs."""
    for pid in services:
        os.kill(pid, signal.SIGUSR1)
    time.sleep(0.2)
    act()
    for pid in services:
        os.kill(pid, signal.SIGUSR2)
    calls: Calls = {}
    end = time.monotonic() + RECORD_LIMIT_S
    for pid, service in services.items():
        path = directory / f"{pid}.json"
        while not path.exists():
            if time.monotonic() > end:
                raise TimeoutError(f"{service} did not write its record")
            time.sleep(0.02)
        counts = calls[service] = collections.Counter()
        for file, line, name, number in json.loads(path.read_text()):
            try:
                place = Path(file).relative_to(repository)
            except ValueError:
                continue
            if place.parts[0] in ("dynamo", "components") and not name.endswith(COMPREHENSIONS):
                counts[Function(str(place), line, name)] += number
        path.unlink()
    return calls


def serve(repository: Path, repetitions: int) -> list[Calls]:
    """Serve the mock graph of a checkout and record `repetitions` chats."""
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        env = {**os.environ, "PYTHONPATH": f"{HERE / 'hook'}", "DYNAMO_ROAD_DIR": directory}
        command = [repository / ".venv/bin/dynamo", "serve", "graphs.agg:Frontend", "-f", "configs/agg_mock.yaml"]
        command += [f"--Frontend.port={port}", "--infra", "embedded", "--VllmWorker.ServiceArgs.workers=1"]
        process = subprocess.Popen(
            command, cwd=repository, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            wait_until_healthy(port, process)
            for _ in range(3):
                chat(port)
            services = service_processes(process.pid)
            timers = recorded(repository, services, Path(directory), lambda: time.sleep(IDLE_S))
            chats = [recorded(repository, services, Path(directory), lambda: chat(port)) for _ in range(repetitions)]
            return [without(calls, timers) for calls in chats]
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=30)


def without(calls: Calls, timers: Calls) -> Calls:
    """Return the calls of functions that do not run on timers."""
    return {
        service: collections.Counter({f: n for f, n in counts.items() if f not in timers[service]})
        for service, counts in calls.items()
    }


def wait_until_healthy(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until the graph can serve a chat. Raises SystemExit when it ends or takes too long."""
    end = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end and process.poll() is None:
        try:
            chat(port)
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("error: the graph did not start")


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.road", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repository", type=Path, default=HERE.parents[1], metavar="DIR")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--list", action="store_true", help="print the functions by file")
    arguments = parser.parse_args()
    repository = arguments.repository.resolve()
    best = min(serve(repository, arguments.repetitions), key=lambda calls: len(set().union(*calls.values())))
    functions = sorted(set().union(*best.values()))
    if arguments.list:
        for file in sorted({function.file for function in functions}):
            print(file)
            for function in (f for f in functions if f.file == file):
                counts = " ".join(f"{service}:{calls[function]}" for service, calls in best.items() if calls[function])
                print(f"    {function.line:4} {function.name}  {counts}")
    engine = [function for function in functions if function.file.startswith(ENGINES)]
    road = [function for function in functions if function not in engine]
    print(f"{summary(road, best)}; in the mock engine {summary(engine, best)}")


def summary(functions: list[Function], calls: Calls) -> str:
    """Describe how many files and functions there are, and how often these were called."""
    files = {function.file for function in functions}
    total = sum(counts[function] for counts in calls.values() for function in functions)
    return f"{len(files)} files, {len(functions)} functions, {total} calls"


if __name__ == "__main__":
    sys.exit(main())
