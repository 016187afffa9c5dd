"""TCP ports for tests, which no other test process takes and no graph chooses by itself."""

from __future__ import annotations

import os

from dynamo.launcher.embedded_servers import free_ports as free_among
from dynamo.transport.network import STREAM_PORTS

FIRST, PER_PROCESS = 10_000, 1_000
"""below the ports that graphs take for NATS, etcd and their services"""


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on, of this pytest-xdist worker's own range: no two processes race for one."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = FIRST + worker % 10 * PER_PROCESS
    assert first + PER_PROCESS <= STREAM_PORTS[0]
    return free_among(count, range(first, first + PER_PROCESS))


def free_port() -> int:
    return free_ports(1)[0]
