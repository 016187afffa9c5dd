"""One graph running on this machine: NATS and etcd, the metrics port, the supervisor, and the cleanup afterwards."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from dynamo import log
from dynamo.engines.kv_transfer.session import SECRET, SHARED
from dynamo.errors import DynamoError, StartError
from dynamo.launcher import embedded_servers, host_metrics, metrics_port, scaling
from dynamo.launcher.console import Console
from dynamo.launcher.host_metrics import HostMetrics, ask_process
from dynamo.launcher.managed_process import Event, ProcessSpec
from dynamo.launcher.run_dir import announce, remove_abandoned
from dynamo.launcher.scaling import LocalScaler
from dynamo.launcher.supervisor import Supervisor
from dynamo.planner.scaling import path_of
from dynamo.sdk.graph_import import absolute_python_path
from dynamo.sdk.spec import spec_of
from dynamo.transport.network import METRICS_ADDRESS, bound_host
from dynamo.worker.environment import RELOAD, RUN_DIR

if TYPE_CHECKING:
    from dynamo.launcher.embedded_servers import Infra
    from dynamo.launcher.metrics_port import MetricsPort
    from dynamo.launcher.serve_plan import ServePlan

RESTART_DELAY_S = 0.2
SERVER_RESTARTS = 20


def run(plan: ServePlan) -> int:
    """Run a graph until it ends; return the exit code. Runs below the guard, in the supervisor's process."""
    log.configure("serve")
    remove_abandoned()
    run_dir = Path(tempfile.mkdtemp(prefix="dynamo-"))  # readable by this user alone
    console = Console()
    code = 1
    try:
        code = uvloop.run(_run(plan, run_dir, console))
    except DynamoError as error:
        console.failed("error", error.message, error.hint or "")
        code = error.exit_code
    finally:
        if code == 0:
            shutil.rmtree(run_dir, ignore_errors=True)
        else:
            for name in ("nats", "etcd"):
                shutil.rmtree(run_dir / name, ignore_errors=True)
            console.print(f"logs are in {run_dir / 'logs'}")
        console.flush()
    return code


def report_death(signal_name: str) -> None:
    """Print that the supervisor died: the guard's line after its cleanup."""
    console = Console()
    console.failed("error", f"the supervisor died ({signal_name}); all its processes were ended", "")
    console.flush()


async def _run(plan: ServePlan, run_dir: Path, console: Console) -> int:
    options = plan.options
    infra = await embedded_servers.find_or_start(run_dir, options.infra)
    console.print(f"joining the graph at {infra.description}" if options.service_names else infra.description)
    try:
        bound_host(infra.nats_url)  # a bad DYN_HOST_IP is one error here instead of one in each process
        port = metrics_port.claim(options, infra.nats_url, plan.reserved_ports())
        if port is not None:
            console.metrics(port.url)
        environment = {**launch_environment(infra, port), RUN_DIR: str(run_dir)}
        if options.reload:
            environment[RELOAD] = "1"
        if options.host:
            environment["DYNAMO_HOST"] = options.host
        revoker = _LeaseRevoker(infra.etcd_endpoints)
        supervisor = Supervisor(
            plan.processes_with(environment),
            run_dir=run_dir,
            console=console,
            on_exit=revoker.revoke,
            other_pids=infra.pids,
            reload=options.reload,
            ready_text=joined_text(plan, infra) if options.service_names else "",
            reach_text=plan.reach,
        )
        scaler = LocalScaler(plan, supervisor, environment)
        supervisor.run_beside("scaling", partial(scaling.serve, path_of(run_dir), scaler))
        for name in infra.embedded:
            supervisor.run_beside(name, partial(keep_server_running, name, infra, console))
        if options.reload:
            from dynamo.launcher.reload import follow_edits  # watchfiles, which only developers need

            supervisor.run_beside("reload", partial(follow_edits, options.working_dir, supervisor))
        if port is not None:
            pages = HostMetrics(port.address, supervisor.processes, partial(ask_process, run_dir)).pages
            supervisor.run_beside("metrics", partial(host_metrics.serve, port, pages))
        metrics_url = port.url if port is not None else ""
        try:
            with announce(run_dir, plan.graph.spec, plan.entry_address, infra.env, metrics_url):
                return await supervisor.run()
        finally:
            await revoker.close()
            if "nats" not in infra.embedded:
                from dynamo.worker.broker import delete_queues  # NATS, which nothing else here needs

                await delete_queues(plan.services, infra.nats_url, infra.etcd_endpoints)
    finally:
        await infra.stop()


def launch_environment(infra: Infra, port: MetricsPort | None) -> dict[str, str]:
    """Return the variables that all processes of a start get: servers, metrics address, and the KV transfer's secret.

    The secret is the one in the environment, which several hosts share, or a new random one.
    """
    shared = os.environ.get(SECRET)
    scripts = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    environment = {**infra.env, SECRET: shared or secrets.token_hex(32), SHARED: "1" if shared else ""}
    environment |= absolute_python_path()
    if scripts not in path.split(os.pathsep):  # for services that run `http`, `llmctl` or `dynamo-run`
        environment["PATH"] = f"{scripts}{os.pathsep}{path}"
    if port is not None:
        environment[METRICS_ADDRESS] = port.address
    return environment


def joined_text(plan: ServePlan, infra: Infra) -> str:
    """Return the line for services that are ready and belong to a graph that runs elsewhere."""
    names = [f"{namespace}/{spec_of(cls).name}" for namespace, cls in plan.services]
    return f"joined {', '.join(names)} of the graph at {infra.nats_address}"


async def keep_server_running(name: str, infra: Infra, console: Console) -> None:
    """Restart an embedded server whenever it ends; the graph keeps serving meanwhile.

    Raises StartError after `SERVER_RESTARTS` restarts.
    """
    for _ in range(SERVER_RESTARTS):
        await infra.processes[name].wait()
        console.print(f"{name} died; restarting it")
        await asyncio.sleep(RESTART_DELAY_S)
        await (infra.restart_nats() if name == "nats" else infra.restart_etcd())
    raise StartError(f"{name} died {SERVER_RESTARTS} times", hint=f"run your own {name} and pass --infra external")


class _LeaseRevoker:
    """Revokes the etcd lease of a process that died: its instances leave discovery without waiting for the TTL."""

    def __init__(self, etcd_endpoints: str) -> None:
        self._etcd_endpoints = etcd_endpoints
        self._etcd: Any = None

    async def revoke(self, _: ProcessSpec, ready: Event) -> None:
        """Revoke the lease in a process's `ready` event, if it has one."""
        lease = ready.get("lease")
        if lease is None:
            return
        if self._etcd is None:
            from dynamo.transport.etcd import Etcd  # grpc, which is needed only when a process has died

            self._etcd = Etcd.connect(self._etcd_endpoints)
        await self._etcd.revoke(int(lease))

    async def close(self) -> None:
        if self._etcd is not None:
            await self._etcd.close()
