"""One graph running on this machine: infrastructure, processes, supervisor, and the end of it all."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from dynamo import log
from dynamo.config.settings import constructor_arguments, declared
from dynamo.engines.kv_transfer.session import SECRET, SHARED
from dynamo.errors import DynamoError, StartError
from dynamo.launcher import embedded_servers, gpus, host_metrics, metrics_port, ports
from dynamo.launcher.console import Console
from dynamo.launcher.host_metrics import HostMetrics, ask_process
from dynamo.launcher.managed_process import Event, ProcessSpec
from dynamo.launcher.plan import plan
from dynamo.launcher.run_dir import announce, remove_abandoned
from dynamo.launcher.supervisor import Supervisor
from dynamo.sdk.spec import spec_of
from dynamo.transport.network import METRICS_ADDRESS, bound_host
from dynamo.worker.environment import RELOAD, RUN_DIR, namespace_of
from dynamo.worker.http_service import http_address

if TYPE_CHECKING:
    from dynamo.config.merge import Resolved
    from dynamo.config.options import ServeOptions
    from dynamo.launcher.metrics_port import MetricsPort
    from dynamo.sdk.graph import Graph

logger = logging.getLogger(__name__)

RESTART_WAIT_S = 0.2
INFRA_RESTARTS = 20


def check(graph: Graph, resolved: Resolved, options: ServeOptions) -> int:
    """How many processes it will be. Raises ConfigError for what would fail later: GPUs that are not there, a port that
    is taken."""
    processes = _plan(graph, resolved, options, {})
    address = _entry_address(graph, resolved)
    if address is not None:
        ports.check(*address)
    metrics_port.check(options, os.environ.get("NATS_SERVER", ""), ports.wanted(address, processes))
    return len(processes)


def _plan(graph: Graph, resolved: Resolved, options: ServeOptions, env: Mapping[str, str]) -> list[ProcessSpec]:
    given = {**env, SECRET: os.environ.get(SECRET) or secrets.token_hex(32)}  # several hosts are given the same
    given[SHARED] = "1" if os.environ.get(SECRET) else ""
    services, visible = resolved.services, gpus.visible()
    return plan(graph, services, working_dir=options.working_dir, visible_gpus=visible, environment=given)


def _metrics_port(
    graph: Graph, resolved: Resolved, options: ServeOptions, servers: embedded_servers.Infra
) -> MetricsPort | None:
    wanted = ports.wanted(_entry_address(graph, resolved), _plan(graph, resolved, options, {}))
    return metrics_port.claim(options, servers.nats_url, wanted)


def _entry_address(graph: Graph, resolved: Resolved) -> tuple[str, int] | None:
    """Host and port of the entry service; None where it serves no HTTP, or runs elsewhere (`--depends`)."""
    if graph.entry not in graph.services.values():
        return None
    given = resolved.services.get(graph.entry.__name__, {})
    spec, found = spec_of(graph.entry), declared(graph.entry)
    if spec.routes or spec.app:
        host, port = http_address(graph.entry, given, entry=True)
        return None if port is None else (host, port)
    if found is None or not {"host", "port"} <= found.settings.keys():
        return None
    settings = {name: setting.default for name, setting in found.settings.items()}
    settings.update(constructor_arguments(graph.entry, given))
    return settings["host"], settings["port"]


def run(graph: Graph, resolved: Resolved, options: ServeOptions) -> int:
    """The supervisor's side of the guard."""
    log.configure("serve")
    remove_abandoned()
    run_dir = Path(tempfile.mkdtemp(prefix="dynamo-"))  # readable by this user alone
    console = Console()
    code = 1
    try:
        code = uvloop.run(_run(graph, resolved, options, run_dir, console))
    except DynamoError as error:
        console.failed("error", error.message, error.hint or "")
        code = error.exit_code
    finally:
        if code == 0:
            shutil.rmtree(run_dir, ignore_errors=True)
        else:
            for name in ("nats", "etcd"):
                shutil.rmtree(run_dir / name, ignore_errors=True)
            console.say(f"logs are in {run_dir / 'logs'}")
        console.flush()
    return code


def report_death(signal_name: str) -> None:
    """The guard's line when it has cleared up behind its supervisor."""
    console = Console()
    console.failed("error", f"the supervisor died ({signal_name}); all its processes were ended", "")
    console.flush()


async def _run(graph: Graph, resolved: Resolved, options: ServeOptions, run_dir: Path, console: Console) -> int:
    servers = await embedded_servers.ensure(run_dir, options.infra)
    console.say(_described(servers, options))
    try:
        bound_host(servers.nats_url)  # a bad DYN_HOST_IP is one error here, not one of each process
        env = {**servers.env, RUN_DIR: str(run_dir), **({RELOAD: "1"} if options.reload else {})}
        port = _metrics_port(graph, resolved, options, servers)
        if port is not None:
            env[METRICS_ADDRESS] = port.address
            console.metrics(port.url)
        processes = _plan(graph, resolved, options, env)
        revoker = _Revoker(servers.etcd_endpoints)
        beside = [(name, _keeper(name, servers, console)) for name in servers.embedded]
        supervisor = Supervisor(
            processes,
            run_dir=run_dir,
            console=console,
            on_exit=revoker.revoke,
            also=beside,
            spare=lambda: [process.pid for process in servers.processes.values()],
            changes=_edits(options.working_dir) if options.reload else None,
            joined=_joined(graph, resolved, servers) if options.service_names else "",
        )
        if port is not None:
            pages = HostMetrics(port.address, supervisor.processes, partial(ask_process, run_dir)).pages
            beside.append(("metrics", partial(host_metrics.serve, port, pages)))
        address, scraped = _entry_address(graph, resolved), port.url if port is not None else ""
        try:
            with announce(run_dir, graph.spec, address, servers.env, scraped):
                return await supervisor.run()
        finally:
            await revoker.close()
            if "nats" not in servers.embedded:
                from dynamo.worker.broker import delete_queues  # NATS, which nothing else needs here

                services = [(namespace_of(cls, resolved.services), cls) for cls in graph.services.values()]
                await delete_queues(services, servers.nats_url, servers.etcd_endpoints)
    finally:
        await servers.stop()


def _edits(working_dir: Path) -> Callable[[], AsyncIterator[Collection[str]]]:
    from dynamo.launcher.reload import edits  # watchfiles, for developers alone

    return lambda: edits(working_dir)


def _keeper(name: str, servers: embedded_servers.Infra, console: Console) -> Any:
    """Restart an embedded server whenever it ends; the graph serves on meanwhile."""

    async def keep() -> None:
        for _ in range(INFRA_RESTARTS):
            await servers.processes[name].wait()
            console.say(f"{name} died; restarting it")
            await asyncio.sleep(RESTART_WAIT_S)
            await (servers.restart_nats() if name == "nats" else servers.restart_etcd())
        raise StartError(f"{name} died {INFRA_RESTARTS} times", hint=f"run your own {name} and pass --infra external")

    return keep


class _Revoker:
    """Ends the lease of a process that died, so that its instances leave discovery now and not after the TTL."""

    def __init__(self, endpoints: str) -> None:
        self._endpoints = endpoints
        self._etcd: Any = None

    async def revoke(self, _: ProcessSpec, ready: Event) -> None:
        lease = ready.get("lease")
        if lease is None:
            return
        if self._etcd is None:
            from dynamo.transport.etcd import Etcd  # grpc, which a graph without deaths never needs here

            self._etcd = Etcd.connect(self._endpoints)
        await self._etcd.revoke(int(lease))

    async def close(self) -> None:
        if self._etcd is not None:
            await self._etcd.close()


def _described(servers: embedded_servers.Infra, options: ServeOptions) -> str:
    return f"joining the graph at {servers.description}" if options.service_names else servers.description


def _joined(graph: Graph, resolved: Resolved, servers: embedded_servers.Infra) -> str:
    """What is told when services of a graph that runs elsewhere are ready."""
    names = [f"{namespace_of(cls, resolved.services)}/{name}" for name, cls in graph.services.items()]
    return f"joined {', '.join(names)} of the graph at {servers.nats_address}"


def run_alone(graph: Graph, resolved: Resolved, options: ServeOptions) -> int:
    """The first process of the graph in this process, in the foreground, beside NATS and etcd that run already.

    Ends with the process: its exit code is the command's.
    """
    from dynamo.worker import process

    started = time.monotonic()
    servers = asyncio.run(embedded_servers.ensure(Path(tempfile.gettempdir()), "external"))
    console = Console()
    console.say(f"joining the graph at {servers.description}")
    console.flush()
    bound_host(servers.nats_url)
    env, port = dict(servers.env), _metrics_port(graph, resolved, options, servers)
    if port is not None:
        env[METRICS_ADDRESS] = port.address
        console.metrics(port.url)
        console.flush()  # in order: the process logs without the console
    spec = _plan(graph, resolved, options, env)[0]

    def ready(event: Event) -> None:
        text = event.get("text") or _joined(graph, resolved, servers)
        console.serving(time.monotonic() - started, event.get("url") or text)

    os.environ.update(spec.env)
    os.chdir(options.working_dir)
    scrape = partial(host_metrics.serve_alone, port, spec) if port is not None else None
    process.main(spec.argv[3:], ready, scrape)
