"""Compatibility with graphs of ai-dynamo 0.1 to 0.3: `dynamo_context`, old names, attributes of service classes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dynamo.sdk.api import api
from dynamo.sdk.context import ServiceContext, observers, service_context
from dynamo.sdk.depends import Dependency, dependencies
from dynamo.sdk.endpoint import async_on_start, endpoint
from dynamo.sdk.graph import build
from dynamo.sdk.interface import abstract_endpoint
from dynamo.sdk.links import EDGES, Edge
from dynamo.sdk.service import AbstractService, class_attributes
from dynamo.sdk.spec import is_service, spec_of

if TYPE_CHECKING:
    from dynamo.compat.declarations import ServiceConfig

dynamo_endpoint = endpoint
dynamo_api = api
AbstractDynamoService = AbstractService
abstract_dynamo_endpoint = abstract_endpoint

async_onstart = async_on_start

dynamo_context: dict[str, Any] = {}
"""`service_context()` under the string keys of 0.x; empty when the class is used as plain Python.

service_name, namespace, worker_id, workers, progress, url: as in `ServiceContext`
runtime: the process's `DistributedRuntime`; component: its `Component` there
endpoints: `ComponentEndpoint` objects; `endpoints[0].lease_id()` is the instance's id
lease: the process's lease, with `id()`
"""


def _fill(context: ServiceContext) -> None:
    from dynamo.runtime.distributed import DistributedRuntime  # loads gRPC, which a dry run must not

    runtime = DistributedRuntime(inner=context.runtime)  # type: ignore[arg-type]  # a service process has a real one
    component = runtime.namespace(context.namespace).component(context.service_name)
    dynamo_context.update(
        service_name=context.service_name,
        namespace=context.namespace,
        worker_id=context.worker_id,
        workers=context.workers,
        progress=context.progress,
        runtime=runtime,
        component=component,
        endpoints=[component.endpoint(name) for name in context.endpoints],
        lease=runtime.primary_lease(),
    )
    if context.url:
        dynamo_context["url"] = context.url


observers.append(_fill)


class _ServerContext:
    """`server_context` of 0.1 and 0.2: in a service process, the number of this worker, from 1; elsewhere 0."""

    @property
    def worker_index(self) -> int:
        context = service_context()
        return context.worker_id if context else 0

    @property
    def service_name(self) -> str:
        context = service_context()
        return context.service_name if context else ""


server_context = _ServerContext()


class _OfClass:
    """An attribute of the class alone; on instances the name stays free for the author."""

    def __init__(self, read: Callable[[type[Any]], Any]) -> None:
        self._read = read

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object | None, owner: type[Any]) -> Any:
        if instance is not None or not is_service(owner):
            raise AttributeError(f"{owner.__name__!r} object has no attribute {self._name!r}")
        return self._read(owner)


class _Dependencies(dict[str, Dependency[Any]]):
    """Active dependencies of a service. Setting one links it: `Frontend.dependencies["x"] = DynamoDependency(X)`."""

    def __init__(self, cls: type[Any]) -> None:
        mine = {edge.attribute for edge in EDGES if edge.source is cls}
        linked = any(cls in (edge.source, edge.target) for edge in EDGES)
        known = dependencies(cls)
        super().__init__({name: known[name] for name in known if name in mine or not (linked or known[name].optional)})
        self._cls = cls

    def __setitem__(self, attribute: str, dependency: Dependency[Any]) -> None:
        graph = sys._getframe(1).f_globals.get("__name__", "")
        EDGES.append(Edge(self._cls, attribute, dependency.on, graph))
        super().__setitem__(attribute, dependency)


def _config(cls: type[Any]) -> ServiceConfig:
    from dynamo.compat.declarations import declared_config  # loads pydantic, which few graphs need

    return declared_config(spec_of(cls))


def _all_services(cls: type[Any]) -> dict[str, type[Any]]:
    return build(cls.__name__, cls, list(EDGES)).services


class _ServiceObject:
    """Attributes of the object that `@service` returned in ai-dynamo 0.1 to 0.3, read by graphs and tests of that time."""

    inner = _OfClass(lambda cls: cls)
    name = _OfClass(lambda cls: spec_of(cls).name)
    config = _OfClass(_config)
    dependencies = _OfClass(_Dependencies)
    get_dynamo_endpoints = _OfClass(lambda cls: lambda: {e.name: e for e in spec_of(cls).endpoints.values()})
    all_services = _OfClass(lambda cls: lambda: _all_services(cls))


class_attributes.append(_ServiceObject)
