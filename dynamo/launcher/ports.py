"""Ports, checked before minutes are spent on loading a model."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dynamo.errors import ConfigError

if TYPE_CHECKING:
    from dynamo.launcher.managed_process import ProcessSpec

SYSTEM_APP_PORT = "DYNAMO_SYSTEM_APP_PORT"


def check(host: str, port: int) -> None:
    """Raises ConfigError when nothing can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}", hint=f"choose another port: --port {port + 1}"
        ) from None


def wanted(entry: tuple[str, int] | None, processes: Sequence[ProcessSpec]) -> set[int]:
    """Ports that the graph's processes will listen on by their configuration: its entry's and those of system apps."""
    given = [{**os.environ, **process.env}.get(SYSTEM_APP_PORT, "") for process in processes]
    return {int(port) for port in given if port.isdecimal()} | ({entry[1]} if entry else set())
