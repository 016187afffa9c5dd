"""The flags of `dynamo serve` that are about the run, not about a service's settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

InfraMode = Literal["auto", "embedded", "external"]


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """`service_names`: run these services of the graph alone, beside those that run elsewhere; none: all of them.
    `supervise`: as a graph is, even if it is one process. `host`, `port`: None where nobody asked for one, as those of
    the metrics port, which 0 turns off.
    """

    working_dir: Path = Path()
    service_names: tuple[str, ...] = ()
    supervise: bool = False
    infra: InfraMode = "auto"
    host: str | None = None
    port: int | None = None
    dry_run: bool = False
    reload: bool = False
    metrics_host: str | None = None
    metrics_port: int | None = None
