"""Where this engine is: its host, and its address for other hosts."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit


def host_id() -> str:
    """The same for all processes of one running kernel."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def own_address() -> str:
    """An address at which other hosts reach this one: DYN_HOST_IP, else the one that faces the NATS server."""
    given = os.environ.get("DYN_HOST_IP")
    if given:
        return given
    nats = urlsplit(os.environ.get("NATS_SERVER", "").partition(",")[0])
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((nats.hostname or "localhost", nats.port or 4222))
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"
