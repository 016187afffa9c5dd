"""The metrics port of one `dynamo serve`: the metrics of all its processes on this host in one page.

The supervisor asks its processes over unix sockets instead of NATS, so that the page is available during an outage of NATS
or etcd. The server is uvicorn: 60 ms of CPU to import, 3 MiB, and 0.2 % of a core. To keep the import out of the start,
the port listens from before the first process starts, and the first connection triggers the import. Python's http.server
would be lighter, but needs threads, beside which the supervisor should not fork.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynamo.launcher.process_usage import ProcessUsage
from dynamo.worker.metrics_socket import METRICS, TARGETS, ask, path_of

if TYPE_CHECKING:
    import socket

    from dynamo.http.prometheus_text import Pages
    from dynamo.launcher.managed_process import ProcessSpec
    from dynamo.launcher.metrics_port import MetricsPort
    from dynamo.launcher.process_slot import ProcessState

log = logging.getLogger(__name__)

REUSE_S = 1.0
"""A page is served again for this long: many scrapers cost as much as one."""

Sample = tuple[dict[str, str], float]
Ask = Callable[["ProcessState", str], Awaitable[bytes]]
"""Returns one page of one process; empty if it does not respond."""


async def ask_process(run_dir: Path, process: ProcessState, page: str) -> bytes:
    """Return one page of a process that this supervisor runs; empty if it does not respond in time."""
    return await ask(path_of(run_dir, process.spec.name), page)


async def serve(port: MetricsPort, pages: Pages) -> None:
    """Serve the pages until cancelled. A failing server is logged and leaves the graph running."""
    try:
        await _first_connection(port.listeners)
        from dynamo.http.metrics_server import MetricsServer

        await MetricsServer(port.listeners, pages).serve()
    except Exception:
        log.exception("the metrics port is closed: %s", port.url)
    finally:
        port.close()


async def serve_alone(port: MetricsPort, spec: ProcessSpec, pages: Pages, ready: Callable[[], bool]) -> None:
    """Serve the pages of a process without a supervisor, this one, and add what a supervisor would report of it."""
    from dynamo.launcher.process_slot import ProcessState

    async def ask(_: ProcessState, page: str) -> bytes:
        return await pages[page]()

    host = HostMetrics(port.address, lambda: [ProcessState(spec, ready(), 0, os.getpid())], ask)
    await serve(port, host.pages)


async def _first_connection(listeners: Sequence[socket.socket]) -> None:
    """Wait until a client connects to one of the listeners; accept nothing."""
    loop = asyncio.get_running_loop()
    connected = asyncio.Event()
    for listener in listeners:
        loop.add_reader(listener.fileno(), connected.set)
    try:
        await connected.wait()
    finally:
        for listener in listeners:
            loop.remove_reader(listener.fileno())


class HostMetrics:
    """The metrics of a host's processes, merged, with what their supervisor knows of each.

    `address` is the host's metrics port, `host:port`.
    """

    def __init__(self, address: str, processes: Callable[[], Sequence[ProcessState]], ask: Ask) -> None:
        self._address = address
        self._processes = processes
        self._ask = ask
        self._usage = ProcessUsage()
        self._page: asyncio.Task[bytes] | None = None
        self._rendered_at = 0.0
        self.pages: Pages = {METRICS: self.metrics, TARGETS: self.targets}

    async def metrics(self) -> bytes:
        """Return the page, at most `REUSE_S` old. Concurrent calls share one rendering."""
        page = self._page
        if page is None or (page.done() and time.monotonic() - self._rendered_at >= REUSE_S):
            page = self._page = asyncio.get_running_loop().create_task(self._render())
        return await asyncio.shield(page)  # a scraper that disconnects does not cancel it for the others

    async def _render(self) -> bytes:
        from dynamo.http.prometheus_text import merge

        try:
            processes = self._processes()
            texts = await asyncio.gather(*(self._ask_if_ready(process, METRICS) for process in processes))
            return merge([self._supervisor_metrics(processes, texts), *texts])
        finally:
            self._rendered_at = time.monotonic()

    def _supervisor_metrics(self, processes: Sequence[ProcessState], texts: Sequence[bytes]) -> bytes:
        from dynamo.http.prometheus_text import family

        usage = self._usage.measure({process.spec.name: process.pid for process in processes})
        up: list[Sample] = []
        restarts: list[Sample] = []
        cpu: list[Sample] = []
        memory: list[Sample] = []
        for process, text in zip(processes, texts, strict=True):
            spec = process.spec
            labels = {"namespace": spec.namespace, "service": spec.service, "worker": str(spec.worker_id)}
            up.append((labels, bool(text)))
            restarts.append((labels, process.restarts))
            if (used := usage.get(spec.name)) is not None:
                cpu.append((labels, used.cpu_s))
                memory.append((labels, used.resident_bytes))
        return b"".join(
            family(f"dynamo_supervisor_{name}", kind, description, samples)
            for name, kind, description, samples in (
                ("process_up", "gauge", "1: the process is ready and returned its metrics.", up),
                ("restarts_total", "counter", "Number of times that the process was restarted.", restarts),
                ("tree_cpu_seconds_total", "counter", "CPU time of the process and its descendants.", cpu),
                ("tree_resident_bytes", "gauge", "Resident memory of the process and its descendants.", memory),
            )
        )

    async def _ask_if_ready(self, process: ProcessState, page: str) -> bytes:
        return await self._ask(process, page) if process.ready else b""

    async def targets(self) -> bytes:
        """Return all hosts' metrics ports, as the first process to respond finds them in etcd; else this host's alone."""
        asked = [asyncio.ensure_future(self._ask_if_ready(process, TARGETS)) for process in self._processes()]
        try:
            for response in asyncio.as_completed(asked):
                if found := await response:
                    return found
        finally:
            for task in asked:
                task.cancel()
        from dynamo.http.prometheus_text import http_sd

        return http_sd([self._address])
