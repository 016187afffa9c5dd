"""A server under measurement, ours or another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks.processes import Process


@dataclass
class Running:
    """A server that answers on `host`:`port`; `processes` are those started here, first to stop first."""

    name: str
    port: int
    model: str
    processes: list[Process]
    role: Callable[[list[str]], str]
    """what a command line is in the table"""
    start_s: float = field(default=0.0)
    host: str = "127.0.0.1"

    def stop(self) -> None:
        for process in self.processes:
            process.stop()


class System(NamedTuple):
    """`start(run_dir, paced)` gives a server that is ready: its mock engine at a modelled pace, or as fast as it can."""

    name: str
    start: Callable[[Path, bool], Running]
