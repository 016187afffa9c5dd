"""The metrics port of one `dynamo serve`: all its processes on this host in one text, for one scrape.

The supervisor asks its processes over unix sockets, not over NATS, so that the text is there while NATS and etcd are
away. The server is uvicorn, which takes 60 ms of CPU to import, 3 MiB, and 0.2 % of a core: little, and not the start's
business. So the port listens from before the first process starts, and the first connection brings the import. Python's
http.server would be lighter, and needs threads, beside which the supervisor should not fork.
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
    from dynamo.launcher.supervisor import ProcessState

log = logging.getLogger(__name__)

KEEP_S = 1.0
"""A page is given again for so long: many scrapers cost what one does."""

Sample = tuple[dict[str, str], float]
Ask = Callable[["ProcessState", str], Awaitable[bytes]]
"""one page of one process; empty where it does not answer"""


async def ask_process(run_dir: Path, process: ProcessState, page: str) -> bytes:
    """Return one page of a process that this supervisor runs; empty if it does not respond in time."""
    return await ask(path_of(run_dir, process.spec.name), page)


async def serve(port: MetricsPort, pages: Pages) -> None:
    """Until cancelled. A server that fails is logged: the graph goes on without it."""
    try:
        await _first_connection(port.listeners)
        from dynamo.http.metrics_server import MetricsServer

        await MetricsServer(port.listeners, pages).serve()
    except Exception:
        log.exception("the metrics port is closed: %s", port.url)
    finally:
        port.close()


async def serve_alone(port: MetricsPort, spec: ProcessSpec, pages: Pages, ready: Callable[[], bool]) -> None:
    """As `serve`, in a process that no supervisor runs: it tells of itself what a supervisor would."""
    from dynamo.launcher.supervisor import ProcessState

    async def ask(_: ProcessState, page: str) -> bytes:
        return await pages[page]()

    host = HostMetrics(port.address, lambda: [ProcessState(spec, ready(), 0, os.getpid())], ask)
    await serve(port, host.pages)


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
    """What the processes of a host count, and what who runs them knows of them itself."""

    def __init__(self, address: str, processes: Callable[[], Sequence[ProcessState]], ask: Ask) -> None:
        self._address, self._processes, self._ask = address, processes, ask
        self._trees = ProcessUsage()
        self._page: asyncio.Task[bytes] | None = None
        self._made_at = 0.0
        self.pages: Pages = {METRICS: self.metrics, TARGETS: self.targets}

    async def metrics(self) -> bytes:
        """The page, at most `KEEP_S` old. Who comes while it is made gets the same."""
        page = self._page
        if page is None or (page.done() and time.monotonic() - self._made_at >= KEEP_S):
            page = self._page = asyncio.get_running_loop().create_task(self._make())
        return await asyncio.shield(page)  # one scraper that leaves is no end of it for the others

    async def _make(self) -> bytes:
        from dynamo.http.prometheus_text import merge

        try:
            processes = self._processes()
            texts = await asyncio.gather(*(self._asked(process, METRICS) for process in processes))
            return merge([self._own(processes, texts), *texts])
        finally:
            self._made_at = time.monotonic()

    def _own(self, processes: Sequence[ProcessState], texts: Sequence[bytes]) -> bytes:
        from dynamo.http.prometheus_text import family

        used = self._trees.look({process.spec.name: process.pid for process in processes})
        up, restarts, cpu, memory = list[Sample](), list[Sample](), list[Sample](), list[Sample]()
        for process, text in zip(processes, texts, strict=True):
            spec = process.spec
            labels = {"namespace": spec.namespace, "service": spec.service, "worker": str(spec.worker_id)}
            up.append((labels, bool(text)))
            restarts.append((labels, process.restarts))
            if (found := used.get(spec.name)) is not None:
                cpu.append((labels, found.cpu_s))
                memory.append((labels, found.resident_bytes))
        return b"".join(
            family(f"dynamo_supervisor_{name}", kind, told, samples)
            for name, kind, told, samples in (
                ("process_up", "gauge", "1: the process is ready, and told its metrics.", up),
                ("restarts_total", "counter", "Times that it was started again.", restarts),
                ("tree_cpu_seconds_total", "counter", "CPU time of the process and its descendants.", cpu),
                ("tree_resident_bytes", "gauge", "Resident memory of the process and its descendants.", memory),
            )
        )

    async def _asked(self, process: ProcessState, page: str) -> bytes:
        return await self._ask(process, page) if process.ready else b""

    async def targets(self) -> bytes:
        """As the first process to answer finds them in etcd; this host alone where none does."""
        asked = [asyncio.ensure_future(self._asked(process, TARGETS)) for process in self._processes()]
        try:
            for answer in asyncio.as_completed(asked):
                if found := await answer:
                    return found
        finally:
            for each in asked:
                each.cancel()
        from dynamo.http.prometheus_text import http_sd

        return http_sd([self._address])
