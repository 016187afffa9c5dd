"""The metrics port of one `dynamo serve`: all its processes on this host in one text, for one scrape.

The supervisor asks its processes over unix sockets, not over NATS, so that the text is there while NATS and etcd are
away. The server is uvicorn, which takes 60 ms of CPU to import, 3 MiB, and 0.2 % of a core: little, and not the start's
business. So the port listens from before the first process starts, and the first connection brings the import. Python's
http.server would be lighter, and needs threads, beside which the supervisor should not fork.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dynamo.errors import ConfigError
from dynamo.serve.metrics_socket import METRICS, TARGETS, Pages, ask, path_of
from dynamo.transport.host import advertised_host, bound_host, is_loopback

if TYPE_CHECKING:
    from dynamo.config.options import ServeOptions
    from dynamo.serve.supervisor import ProcessState

DEFAULT_PORTS = range(9091, 9191)  # the first is that of ai-dynamo's metrics program
LOOPBACK, ANY = "127.0.0.1", ("", "0.0.0.0", "::")
BACKLOG = 128


@dataclass(frozen=True)
class MetricsPort:
    """`address`: what others scrape, `host:port`."""

    address: str
    listeners: Sequence[socket.socket]

    @property
    def url(self) -> str:
        return f"http://{self.address}/metrics"

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()


def claim(options: ServeOptions, nats_url: str) -> MetricsPort | None:
    """Listen on the port that was asked for, else on the first of `DEFAULT_PORTS` that is free; None: no port is wanted.

    On the address where the processes of this host listen, and on that of loopback, or on the one that was asked for.
    Raises ConfigError where that is not possible.
    """
    host, port = options.metrics_host, options.metrics_port
    if port == 0:
        return None
    hosts = [bound_host(nats_url) if host is None else host]
    if host is None and not is_loopback(hosts[0]) and hosts[0] not in ANY:
        hosts.append(LOOPBACK)
    told = host if host and host not in ANY else advertised_host(nats_url)
    for candidate in [port] if port else DEFAULT_PORTS:
        try:
            listeners = _listen(hosts, candidate)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and port is None:
                continue
            fact = (error.strerror or str(error)).partition(" (")[0]  # Python adds the address
            raise ConfigError(
                f"cannot listen on {hosts[0]}:{candidate} for metrics: {fact}",
                hint=f"choose another port: --metrics-port {candidate + 1}, or 0 for none",
            ) from None
        return MetricsPort(f"{f'[{told}]' if ':' in told else told}:{candidate}", listeners)
    raise ConfigError(
        f"ports {DEFAULT_PORTS[0]} to {DEFAULT_PORTS[-1]} are taken on {hosts[0]}, one is for metrics",
        hint="choose a port with --metrics-port, or 0 for none",
    )


def _listen(hosts: Sequence[str], port: int) -> list[socket.socket]:
    with contextlib.ExitStack() as opened:
        found = []
        for host in hosts:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            every = host == "::"  # IPv4 too
            listener = socket.create_server(
                ("" if every else host, port), family=family, backlog=BACKLOG, dualstack_ipv6=every
            )
            found.append(opened.enter_context(listener))
        opened.pop_all()
        return found


async def serve(port: MetricsPort, pages: Pages) -> None:
    """Until cancelled."""
    try:
        await _first_connection(port.listeners)
        from dynamo.http.metrics_server import MetricsServer

        await MetricsServer(port.listeners, pages).serve()
    finally:
        port.close()


async def _first_connection(listeners: Sequence[socket.socket]) -> None:
    loop, connected = asyncio.get_running_loop(), asyncio.Event()
    for listener in listeners:
        loop.add_reader(listener.fileno(), connected.set)
    try:
        await connected.wait()
    finally:
        for listener in listeners:
            loop.remove_reader(listener.fileno())


class HostMetrics:
    """What the processes of a supervisor count, and what it knows of them itself."""

    def __init__(self, run_dir: Path, address: str, processes: Callable[[], Sequence[ProcessState]]) -> None:
        self._run_dir, self._address, self._processes = run_dir, address, processes
        self.pages: Pages = {METRICS: self.metrics, TARGETS: self.targets}

    async def metrics(self) -> bytes:
        from dynamo.http.exposition import family, merge

        processes = self._processes()
        texts = await asyncio.gather(*map(self._text, processes))
        up, restarts = [], []
        for process, text in zip(processes, texts, strict=True):
            labels = {"service": process.spec.service, "worker": str(process.spec.worker_id)}
            up.append((labels, bool(text)))
            restarts.append((labels, process.restarts))
        told = "1: the process is ready, and told its metrics."
        own = family("dynamo_supervisor_process_up", "gauge", told, up)
        own += family("dynamo_supervisor_restarts_total", "counter", "Times that it was started again.", restarts)
        return merge([own, *texts])

    async def _text(self, process: ProcessState) -> bytes:
        return await ask(path_of(self._run_dir, process.spec.name), METRICS) if process.ready else b""

    async def targets(self) -> bytes:
        """As one of the processes finds them in etcd; this host alone where none is ready."""
        for process in self._processes():
            if process.ready and (found := await ask(path_of(self._run_dir, process.spec.name), TARGETS)):
                return found
        from dynamo.http.exposition import http_sd

        return http_sd([self._address])
