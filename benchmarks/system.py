"""A server under measurement, ours or another."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks.processes import Process, command_line, descendants, free_port

REPOSITORY = Path(__file__).parents[1]


@dataclass
class Running:
    """A server that answers on `host`:`port`; `processes` are those started here, first to stop first."""

    name: str
    port: int
    model: str
    processes: list[Process]
    role: Callable[[list[str]], str]
    """name of a command line's process in the table"""
    start_s: float = field(default=0.0)
    host: str = "127.0.0.1"

    def stop(self) -> None:
        """Stop the processes, then kill those of their descendants that still run."""
        children = {pid: command_line(pid) for process in self.processes for pid in descendants(process.pid)}
        for process in self.processes:
            process.stop()
        for pid, argv in children.items():
            if argv and command_line(pid) == argv:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


class System(NamedTuple):
    """`start(run_dir, paced)` returns a ready server: its mock engine at a modelled pace, or as fast as it can."""

    name: str
    start: Callable[[Path, bool], Running]


@contextlib.contextmanager
def stopped_on_error(running: Running) -> Iterator[None]:
    try:
        yield
    except BaseException:
        running.stop()
        raise


def serve_graph(
    name: str,
    model: str,
    graph: str,
    config: str,
    settings: Sequence[str],
    run_dir: Path,
    limit_s: float,
    env: Mapping[str, str] | None = None,
    repository: Path = REPOSITORY,
) -> Running:
    """Start `dynamo serve` with its own NATS and etcd and wait until it is ready.

    `settings` are KEY=VALUE; `repository` is a checkout, whose `.venv` is used if it is not this one. Raises StartError if
    it is not ready within `limit_s`.
    """
    port = free_port()
    python = sys.executable if repository == REPOSITORY else repository / ".venv/bin/python"
    process = Process(
        [python, "-m", "dynamo", "serve", graph, "-f", config, "--infra", "embedded", "--host", "127.0.0.1",
         "--port", str(port), *(f"--{setting}" for setting in settings)],
        run_dir / "serve.log", {"DYN_LOG": "warn", **(env or {})}, repository,
    )  # fmt: skip
    running = Running(name, port, model, [process], role_of)
    with stopped_on_error(running):
        running.start_s = process.wait_for(
            lambda: re.search(rb"(?m)^ready in ", process.log.read_bytes()) is not None, limit_s, "dynamo serve"
        )
    return running


def role_of(argv: list[str]) -> str:
    """Return the role of a process of ours by its command line: the service's name, NATS or other."""
    if "--service-name" in argv:
        return argv[argv.index("--service-name") + 1]
    return "NATS" if argv and Path(argv[0]).name == "nats-server" else "other"
