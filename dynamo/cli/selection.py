"""The services of a graph that a command starts: `--depends` and `--service-name`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dynamo.errors import ConfigError

if TYPE_CHECKING:
    from dynamo.sdk.graph import Graph


def without(graph: Graph, elsewhere: Sequence[str]) -> Graph:
    """Return the graph without the services that `--depends` names.

    Raises ConfigError, with ai-dynamo's message and exit code 1, for a bad option.
    """
    names = set()
    for given in elsewhere:
        name, equals, _ = given.partition("=")
        if not equals or not name:
            raise ConfigError(
                "Invalid format for --depends option. Use format 'name=value'",
                hint=f"write --depends {name or 'NAME'}=elsewhere",
            )
        graph.service(name)
        names.add(name)
    services = {name: cls for name, cls in graph.services.items() if name not in names}
    if not services:
        raise ConfigError("--depends leaves no service to start", hint="name only services that run elsewhere")
    return replace(graph, services=services)


def select(graph: Graph, names: Sequence[str]) -> Graph:
    """Return the graph with only the named services, all if no name is given. Raises GraphError for an unknown one."""
    if not names:
        return graph
    named = {name: graph.service(name) for name in names}
    return replace(graph, services={name: cls for name, cls in graph.services.items() if name in named})


def require_external(infra: str, option: str) -> str:
    """Return `external`: services elsewhere are found through shared servers. Raises ConfigError for private ones."""
    if infra == "embedded":
        raise ConfigError(
            f"{option} needs the NATS and etcd of the services elsewhere, but --infra embedded starts private ones",
            hint="set NATS_SERVER and ETCD_ENDPOINTS, and omit --infra",
        )
    return "external"
