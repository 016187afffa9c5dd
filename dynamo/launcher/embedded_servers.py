"""NATS and etcd for a graph: the ones named in the environment, those on their usual ports, or private ones.

infra = await find_or_start(run_dir, "auto")
print(infra.description)
os.environ.update(infra.env)  # NATS_SERVER, ETCD_ENDPOINTS
...
await infra.stop()
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import socket
import time
from asyncio.subprocess import DEVNULL, Process
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from dynamo import prctl
from dynamo.config.options import InfraMode
from dynamo.errors import StartError
from dynamo.launcher.server_kinds import ETCD, NATS, ServerKind, find_binary
from dynamo.transport.network import STREAM_PORTS, without_credentials

READY_S = 15.0  # an idle machine needs 0.15 s
STOP_S = 2.0
CONNECT_S = 1.0
LAST_LINES = 8


class EmbeddedServer:
    """One server on loopback: a child process that dies with this one, however this one ends.

    Its data is in `run_dir/<name>`, its output in `run_dir/<name>.log`. A restart keeps ports and data.
    """

    def __init__(self, kind: ServerKind, run_dir: Path) -> None:
        self.kind = kind
        self.data = run_dir.absolute() / kind.name
        self.log = run_dir.absolute() / f"{kind.name}.log"
        self.ports: list[int] = []
        self.process: Process | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ports[0]}"

    async def start(self) -> None:
        """Start the server and wait until it serves. Raises StartError, with its last output lines, if it does not."""
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
        """Start the process; return its output so far once it serves, has ended, or `READY_S` have passed."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}  # etcd reads them
        self.data.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            begin = log.tell()
            self.process = await asyncio.create_subprocess_exec(
                binary, *self.kind.command(self.data, self.ports), env=environ, stdin=DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=partial(prctl.die_with_parent, signal.SIGKILL, os.getpid()),
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
        """End the process (SIGTERM, SIGKILL after `STOP_S`) and wait for its end; no-op if it is not running."""
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
    """NATS and etcd of one graph. `embedded` has, by name, those that this process started."""

    def __init__(self, urls: dict[str, str], embedded: dict[str, EmbeddedServer], description: str) -> None:
        self.nats_url = urls["nats"]
        self.etcd_endpoints = urls["etcd"]
        self.env = {NATS.variable: self.nats_url, ETCD.variable: self.etcd_endpoints}
        self.embedded = embedded
        self.description = description

    @property
    def processes(self) -> dict[str, Process]:
        """The embedded servers' processes by name ("nats", "etcd"), for a supervisor to watch; new after a restart."""
        return {name: server.process for name, server in self.embedded.items() if server.process is not None}

    @property
    def nats_address(self) -> str:
        """The URL of NATS without user and password."""
        return f"{NATS.scheme}://{_addresses(self.nats_url, NATS)}"

    def pids(self) -> list[int]:
        """Return the pids of the embedded servers."""
        return [process.pid for process in self.processes.values()]

    async def restart_nats(self) -> None:
        """Start the embedded NATS again on the same port, with JetStream's files; end it first if it is running."""
        await self._restart("nats")

    async def restart_etcd(self, *, wipe: bool = False) -> None:
        """Start the embedded etcd again on the same port, with its data or (`wipe`) empty; end it first if running."""
        await self._restart("etcd", wipe)

    async def _restart(self, name: str, wipe: bool = False) -> None:
        server = self.embedded[name]
        await server.stop()
        if wipe:
            await asyncio.to_thread(shutil.rmtree, server.data)
        await server.start()

    async def stop(self) -> None:
        """End the embedded servers. May be called twice."""
        await asyncio.gather(*(server.stop() for server in self.embedded.values()))


async def find_or_start(run_dir: Path, mode: InfraMode = "auto") -> Infra:
    """Find or start NATS and etcd for a graph, each of the two by itself.

    `auto`: the server that NATS_SERVER or ETCD_ENDPOINTS names; else the one listening on 127.0.0.1 and its usual port
    (4222, 2379); else a private one with its files in `run_dir`. `embedded`: always private ones. `external`: never
    private ones. Raises StartError if a named server does not answer or a private one does not start; then none is
    left running.

    Call it from the main thread: private servers die with the thread that started them.
    """
    urls: dict[str, str] = {}
    places: list[str] = []
    embedded: dict[str, EmbeddedServer] = {}
    for kind in (NATS, ETCD):
        url, origin = ("", "") if mode == "embedded" else await _find_running(kind, required=mode == "external")
        if url:
            urls[kind.name] = url
            places.append(f"{kind.name} {_addresses(url, kind)} ({origin})")
        else:
            embedded[kind.name] = EmbeddedServer(kind, run_dir)
    try:
        outcomes = await asyncio.gather(*(server.start() for server in embedded.values()), return_exceptions=True)
        for error in filter(None, outcomes):
            raise error
    except BaseException:
        await asyncio.gather(*(server.stop() for server in embedded.values()))
        raise
    if embedded:
        urls |= {name: f"{server.kind.scheme}://{server.address}" for name, server in embedded.items()}
        started = ", ".join(f"{name} {server.address}" for name, server in embedded.items())
        places.append(f"embedded {started} in {run_dir}")
    return Infra(urls, embedded, ", ".join(places))


async def _find_running(kind: ServerKind, required: bool) -> tuple[str, str]:
    """Return the URL of a running server and how it was found; two empty strings if one is to be started."""
    url = os.environ.get(kind.variable, "").strip()
    named = bool(url)
    url = url or f"{kind.scheme}://127.0.0.1:{kind.port}"
    for address in _addresses(url, kind).split(","):
        host, _, port = address.rpartition(":")
        if await is_listening(host.strip("[]"), int(port)):
            return url, kind.variable if named else "found there"
    if not (named or required):
        return "", ""
    where = f"{_addresses(url, kind)} ({kind.variable})" if named else _addresses(url, kind)
    hint = f"start it, or unset {kind.variable} to have one started"
    if required:
        hint = f"start it, or set {NATS.variable} and {ETCD.variable} to where they run"
    raise StartError(f"{kind.name} does not answer at {where}", hint=hint)


def _addresses(urls: str, kind: ServerKind) -> str:
    """Reduce URLs to their addresses: `"http://user:secret@a:2379,http://b"` -> `"a:2379,b:2379"`."""
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


async def is_listening(host: str, port: int) -> bool:
    """Return True if a TCP connection to the address succeeds within `CONNECT_S`."""
    try:
        async with asyncio.timeout(CONNECT_S):
            _, writer = await asyncio.open_connection(host, port)
    except OSError:  # includes TimeoutError
        return False
    writer.close()
    return True


def free_ports(count: int, among: range = STREAM_PORTS) -> list[int]:
    """Return ports of loopback that are free now.

    The default range is below Linux' ephemeral ports: no outgoing connection takes one while its server restarts.
    """
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
    raise StartError(f"no free port between {among[0]} and {among[-1]}", hint="end a program that listens there")
