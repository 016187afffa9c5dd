"""Adding and removing workers of a running graph: the verbs over the supervisor, and their unix socket."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from dynamo.config.provenance import suggestion
from dynamo.config.settings import declared
from dynamo.errors import ConfigError, DynamoError, RequestError
from dynamo.launcher.plan import gpus_of
from dynamo.planner.scaling import MAX_LINE_BYTES, Reply, Request, Scaler, ServiceInfo, WorkerInfo
from dynamo.rpc.remote_errors import pack
from dynamo.sdk.spec import spec_of
from dynamo.worker.environment import namespace_of

if TYPE_CHECKING:
    from dynamo.launcher.process_slot import ProcessState
    from dynamo.launcher.serve_plan import ServePlan
    from dynamo.launcher.supervisor import Supervisor

log = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 5.0


class LocalScaler:
    """A `Scaler` of the processes that this supervisor runs. `environment` are the variables that all of them get."""

    def __init__(self, plan: ServePlan, supervisor: Supervisor, environment: Mapping[str, str]) -> None:
        self._plan = plan
        self._supervisor = supervisor
        self._environment = environment
        self._planned = Counter(process.service for process in plan.processes)

    async def services(self) -> list[ServiceInfo]:
        states = self._supervisor.processes()
        return [
            ServiceInfo(
                namespace_of(cls, self._plan.resolved.services),
                name,
                self._planned[name],
                [_info(state) for state in states if state.spec.service == name],
            )
            for name, cls in self._plan.graph.services.items()
        ]

    async def add(self, service: str) -> WorkerInfo:
        running = [state.spec for state in self._supervisor.processes()]
        self._check_service(service)
        if self._listens_alone(service):
            raise ConfigError(
                f"{service} listens on a port that it does not share",
                hint=f"start the graph with --{service}.ServiceArgs.workers=2 or more",
            )
        spec = self._plan.another(service, running, self._environment)
        await self._supervisor.add(spec)
        return WorkerInfo(spec.name, "ready", gpus=gpus_of(spec))

    async def remove(self, service: str, worker: str = "") -> WorkerInfo:
        self._check_service(service)
        states = [s for s in self._supervisor.processes() if s.spec.service == service and not s.leaving]
        names = [state.spec.name for state in states]
        if worker and worker not in names:
            raise ConfigError(f"{service} has no worker {worker!r}", hint=suggestion(worker, names, "workers"))
        chosen = next(s for s in reversed(states) if worker in ("", s.spec.name))
        if not any(state.ready for state in states if state is not chosen):
            raise ConfigError(
                f"{chosen.spec.name} stays: no other worker of {service} is ready", hint="Ctrl-C stops the whole graph"
            )
        await self._supervisor.remove(chosen.spec.name)
        return WorkerInfo(chosen.spec.name, "draining", gpus=gpus_of(chosen.spec))

    def _check_service(self, service: str) -> None:
        services = self._plan.graph.services
        if service not in services:
            raise ConfigError(f"{service}: no such service here", hint=suggestion(service, services, "services"))

    def _listens_alone(self, service: str) -> bool:
        """Return whether the service's only process has a port: several share one only if they were started as several."""
        cls = self._plan.graph.services[service]
        found = declared(cls)
        has_port = bool(spec_of(cls).routes or spec_of(cls).app) or (found is not None and "port" in found.settings)
        return has_port and self._planned[service] == 1


def _info(state: ProcessState) -> WorkerInfo:
    gpus, progress = gpus_of(state.spec), state.progress
    if state.leaving:
        return WorkerInfo(state.spec.name, "draining", state.pid, gpus, state.restarts)
    if state.ready:
        return WorkerInfo(state.spec.name, "ready", state.pid, gpus, state.restarts)
    if state.pid is None:
        return WorkerInfo(state.spec.name, "restarting", None, gpus, state.restarts)
    return WorkerInfo(state.spec.name, "starting", state.pid, gpus, state.restarts, progress)


async def serve(path: Path, scaler: Scaler) -> None:
    """Answer requests on a unix socket until cancelled; without it, if the socket cannot be opened."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                line = await reader.readline()
            writer.write(msgspec.json.encode(await _reply(line, scaler)) + b"\n")
            await writer.drain()
        except (OSError, ValueError, TimeoutError) as error:
            log.debug("request to scale not answered: %r", error)
        finally:
            writer.close()

    try:
        server = await asyncio.start_unix_server(answer, path, limit=MAX_LINE_BYTES)
        path.chmod(0o600)
    except OSError as error:  # such as a path of more than 107 bytes
        log.warning("the graph cannot be scaled while it runs: %s: %s", path, error)
        return
    try:
        await asyncio.Event().wait()
    finally:
        server.close()


async def _reply(line: bytes, scaler: Scaler) -> Reply:
    try:
        request = msgspec.json.decode(line, type=Request)
    except msgspec.MsgspecError as error:
        return Reply(failure=pack(RequestError(f"not a request to scale: {error}")))
    try:
        match request.verb:
            case "list":
                return Reply(services=await scaler.services())
            case "add":
                return Reply(worker=await scaler.add(request.service))
            case "remove":
                return Reply(worker=await scaler.remove(request.service, request.worker))
    except DynamoError as error:
        return Reply(failure=pack(error))
    except Exception as error:
        log.exception("%s %s failed", request.verb, request.service)
        return Reply(failure=pack(error))
