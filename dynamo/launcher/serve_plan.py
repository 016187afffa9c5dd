"""The plan of one `dynamo serve`: graph, configuration, processes and ports, known before anything starts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dynamo.config.settings import constructor_arguments, declared
from dynamo.environment import api_keys
from dynamo.launcher import gpus, metrics_port, ports
from dynamo.launcher.managed_process import ProcessSpec
from dynamo.launcher.plan import plan, plan_another
from dynamo.sdk.spec import spec_of
from dynamo.transport.network import is_loopback
from dynamo.worker.environment import namespace_of
from dynamo.worker.http_service import http_address

if TYPE_CHECKING:
    from dynamo.config.merge import Resolved
    from dynamo.config.options import ServeOptions
    from dynamo.sdk.graph import Graph


@dataclass(frozen=True)
class ServePlan:
    """`entry_address`: host and port of the entry service; None if it serves no HTTP or runs elsewhere (`--depends`)."""

    graph: Graph
    resolved: Resolved
    options: ServeOptions
    processes: tuple[ProcessSpec, ...]
    entry_address: tuple[str, int] | None
    visible_gpus: tuple[str, ...] = ()

    @property
    def services(self) -> list[tuple[str, type]]:
        """Namespace and class of each service that is started."""
        return [(namespace_of(cls, self.resolved.services), cls) for cls in self.graph.services.values()]

    @property
    def reach(self) -> str:
        """A line on who reaches the entry service, for the terminal; empty if it listens nowhere."""
        if self.entry_address is None:
            return ""
        host, entry = self.entry_address[0], self.graph.entry
        found = declared(entry)
        if found is None or "api-keys" not in found.settings:
            return reach(host, has_keys=None)
        keys = constructor_arguments(entry, self.resolved.services.get(entry.__name__, {})).get("api_keys")
        return reach(host, has_keys=bool(keys) or (keys is None and bool(api_keys())))

    def reserved_ports(self) -> set[int]:
        """Return the ports that the processes will listen on by their configuration."""
        return ports.configured_ports(self.entry_address, self.processes)

    def processes_with(self, environment: Mapping[str, str]) -> list[ProcessSpec]:
        """Return the processes with variables that are known only at the start; a service's own variables win."""
        return [replace(process, env={**environment, **process.env}) for process in self.processes]

    def another(self, service: str, running: Sequence[ProcessSpec], environment: Mapping[str, str]) -> ProcessSpec:
        """Return one more worker of a service beside the processes that are `running`, with variables as above.

        Raises ConfigError if too few GPUs are free.
        """
        process = plan_another(
            self.graph,
            self.resolved.services,
            service,
            running,
            working_dir=self.options.working_dir,
            visible_gpus=self.visible_gpus,
        )
        return replace(process, env={**environment, **process.env})


def reach(host: str, *, has_keys: bool | None) -> str:
    """Return a line on who reaches a server that listens on `host`. `has_keys` None: it knows no API keys."""
    if is_loopback(host):
        return "only this machine reaches it; --host 0.0.0.0 opens it to others"
    if has_keys is None:
        return "other machines reach it"
    if has_keys:
        return "other machines reach it with an API key"
    return "other machines reach it without a key: DYN_API_KEYS sets keys that clients must send"


def make_plan(graph: Graph, resolved: Resolved, options: ServeOptions) -> ServePlan:
    """Plan the processes of a graph. Raises ConfigError if there are too few GPUs."""
    visible_gpus = tuple(gpus.visible())
    processes = plan(graph, resolved.services, working_dir=options.working_dir, visible_gpus=visible_gpus)
    return ServePlan(graph, resolved, options, tuple(processes), _entry_address(graph, resolved), visible_gpus)


def check_ports(plan: ServePlan) -> None:
    """Raise ConfigError for a port or an address on which the entry service or the metrics port cannot listen."""
    if plan.entry_address is not None:
        ports.check(*plan.entry_address)
    metrics_port.check(plan.options, os.environ.get("NATS_SERVER", ""), plan.reserved_ports())


def _entry_address(graph: Graph, resolved: Resolved) -> tuple[str, int] | None:
    if graph.entry not in graph.services.values():
        return None
    given = resolved.services.get(graph.entry.__name__, {})
    spec = spec_of(graph.entry)
    if spec.serves_http:
        host, port = http_address(graph.entry, given, entry=True)
        return None if port is None else (host, port)
    found = declared(graph.entry)
    if found is None or not {"host", "port"} <= found.settings.keys():
        return None
    settings = {name: setting.default for name, setting in found.settings.items()}
    settings.update(constructor_arguments(graph.entry, given))
    return settings["host"], settings["port"]
