"""The graph's own ports, checked before minutes are spent on loading a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dynamo.errors import ConfigError
from dynamo.transport.network import listening_at

if TYPE_CHECKING:
    from dynamo.launcher.managed_process import ProcessSpec

SYSTEM_APP_PORT = "DYNAMO_SYSTEM_APP_PORT"


def check(host: str, port: int) -> None:
    """Raise ConfigError if this host cannot listen on the address."""
    try:
        listening_at(host, port).close()
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}", hint=f"choose another port: --port {port + 1}"
        ) from None


def configured_ports(entry: tuple[str, int] | None, processes: Sequence[ProcessSpec]) -> set[int]:
    """Return the ports that the graph's processes will listen on: the entry's and those of system apps."""
    given = [{**os.environ, **process.env}.get(SYSTEM_APP_PORT, "") for process in processes]
    return {int(port) for port in given if port.isdecimal()} | ({entry[1]} if entry else set())
