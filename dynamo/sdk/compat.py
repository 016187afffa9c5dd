"""Compatibility with graphs of ai-dynamo 0.1 to 0.3: `dynamo_context`, old names, attributes of service classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dynamo.sdk.api import api
from dynamo.sdk.context import ServiceContext, observers
from dynamo.sdk.depends import dependencies
from dynamo.sdk.endpoint import endpoint
from dynamo.sdk.graph import build
from dynamo.sdk.interface import abstract_endpoint
from dynamo.sdk.links import EDGES
from dynamo.sdk.service import AbstractService, class_attributes
from dynamo.sdk.spec import is_service, spec_of

dynamo_endpoint = endpoint
dynamo_api = api
AbstractDynamoService = AbstractService
abstract_dynamo_endpoint = abstract_endpoint

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


def _active_dependencies(cls: type[Any]) -> dict[str, Any]:
    mine = {edge.attribute for edge in EDGES if edge.source is cls}
    linked = any(cls in (edge.source, edge.target) for edge in EDGES)
    return {name: found for name, found in dependencies(cls).items() if name in mine or not (linked or found.optional)}


def _all_services(cls: type[Any]) -> dict[str, type[Any]]:
    return build(cls.__name__, cls, list(EDGES)).services


class _ServiceObject:
    """Attributes of the object that `@service` returned in ai-dynamo 0.1 to 0.3, read by graphs and tests of that time."""

    inner = _OfClass(lambda cls: cls)
    name = _OfClass(lambda cls: spec_of(cls).name)
    config = _OfClass(spec_of)
    dependencies = _OfClass(_active_dependencies)
    get_dynamo_endpoints = _OfClass(lambda cls: lambda: {e.name: e for e in spec_of(cls).endpoints.values()})
    all_services = _OfClass(lambda cls: lambda: _all_services(cls))


class_attributes.append(_ServiceObject)
