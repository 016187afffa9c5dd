"""Which host this is, and where others reach it."""

from __future__ import annotations

import functools
import os
import socket
import uuid
from pathlib import Path
from urllib.parse import urlsplit


@functools.cache
def host_id() -> str:
    """The same for all processes of one running kernel: unix sockets and memory may be shared between them."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{uuid.getnode():x}"


def advertised_host(nats_url: str) -> str:
    """The address on which other processes reach this one: DYN_HOST_IP, else the one that faces the NATS server."""
    given = os.environ.get("DYN_HOST_IP")
    if given:
        return given
    parts = urlsplit(nats_url.partition(",")[0])
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((parts.hostname or "localhost", parts.port or 4222))
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"
