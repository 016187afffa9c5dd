"""Ports, checked before minutes are spent on loading a model."""

from __future__ import annotations

import socket

from dynamo.errors import ConfigError


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
