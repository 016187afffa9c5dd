"""The flags of `dynamo serve` that are about the run, not about a service's settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Infra = Literal["auto", "embedded", "external"]


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """`service_name`: run this service alone, in the foreground. `host`, `port`: None where nobody asked for one."""

    working_dir: Path = Path()
    service_name: str | None = None
    infra: Infra = "auto"
    host: str | None = None
    port: int | None = None
    dry_run: bool = False
    reload: bool = False
