"""`ServiceSpec`: the declaration that `@service` attaches to a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard

from dynamo.errors import GraphError
from dynamo.sdk.api import Route
from dynamo.sdk.channels import ChannelSpec
from dynamo.sdk.endpoint import EndpointSpec

SPEC_MARK = "__dynamo_service__"


class Resources(NamedTuple):
    """Resources of one worker process. `gpu` may be a fraction; `cpu` and `memory` are for deployment tools."""

    gpu: float = 0.0
    cpu: str = "1"
    memory: str = "500Mi"

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Resources:
        try:
            gpu = float(given.get("gpu", 0) or 0)
        except (TypeError, ValueError):
            raise GraphError(f"resources.gpu: expected a number, found {given.get('gpu')!r}") from None
        return cls(gpu, str(given.get("cpu", "1")), str(given.get("memory", "500Mi")))


APP_DOCUMENTATION = ("openapi", "swagger_ui_html", "swagger_ui_redirect", "redoc_html")
"""names of the routes that every FastAPI application has"""


@dataclass(frozen=True)
class ServiceSpec:
    """Declaration of a service: plain data, no sockets."""

    name: str
    namespace: str
    component_type: str | None
    resources: Resources
    workers: int
    image: str | None
    envs: Mapping[str, str]
    app: Any
    endpoints: Mapping[str, EndpointSpec]  # by method name
    routes: Sequence[Route] = ()
    system_app: Any = None
    channels: Mapping[str, ChannelSpec] = field(default_factory=dict)  # by attribute

    @property
    def address(self) -> tuple[str, str]:
        return self.namespace, self.name

    @property
    def serves_http(self) -> bool:
        """True for a service with `@api` methods, or with an application that has routes besides its documentation."""
        if self.routes or self.app is None:
            return bool(self.routes)
        routes = getattr(self.app, "routes", None)
        return routes is None or any(getattr(route, "name", None) not in APP_DOCUMENTATION for route in routes)


def spec_of(cls: type[Any]) -> ServiceSpec:
    """Return the declaration of a service class. Raises GraphError for a class that is not decorated itself."""
    spec = vars(cls).get(SPEC_MARK) if isinstance(cls, type) else None
    if not isinstance(spec, ServiceSpec):
        name = cls.__name__ if isinstance(cls, type) else repr(cls)
        raise GraphError(f"{name} is not a service", hint=f"decorate class {name} with @service")
    return spec


def is_service(value: object) -> TypeGuard[type[Any]]:
    return isinstance(value, type) and isinstance(vars(value).get(SPEC_MARK), ServiceSpec)


class Interface:
    """Marker base of `AbstractService`: a subclass without `@service` is an interface."""


def is_interface(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Interface) and not is_service(value)
