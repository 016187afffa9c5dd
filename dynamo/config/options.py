"""The flags of `dynamo serve` that concern the run as a whole, not the settings of a service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

InfraMode = Literal["auto", "embedded", "external"]


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The flags of one run of `dynamo serve`. For hosts and ports, None means that the flag was not given.

    `supervise`: supervise a single process too, as the processes of a graph are.
    """

    working_dir: Path = Path()
    service_names: tuple[str, ...] = ()
    """run only these services of the graph, beside those that run elsewhere; empty: all of them"""
    supervise: bool = False
    infra: InfraMode = "auto"
    host: str | None = None
    port: int | None = None
    dry_run: bool = False
    reload: bool = False
    metrics_host: str | None = None
    metrics_port: int | None = None
    """0 turns the metrics port off"""
