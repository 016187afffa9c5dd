"""The declarations of ai-dynamo 0.3 as its `dynamo.sdk.core.protocol.interface` named them, over those of `dynamo.sdk`."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from dynamo.sdk.api import ROUTE_MARK, DynamoTransport
from dynamo.sdk.depends import Dependency, Stub
from dynamo.sdk.endpoint import ENDPOINT_MARK, endpoint
from dynamo.sdk.service import AbstractService
from dynamo.sdk.spec import ServiceSpec, is_service

__all__ = [
    "AbstractDynamoService",
    "AbstractService",
    "ComponentType",
    "DependencyInterface",
    "DynamoClient",
    "DynamoConfig",
    "DynamoDependency",
    "DynamoEndpoint",
    "DynamoEndpointInterface",
    "DynamoTransport",
    "Env",
    "KubernetesOverrides",
    "LeaseConfig",
    "LinkedServices",
    "ResourceConfig",
    "ServiceConfig",
    "ServiceInterface",
    "declared_config",
]

T = TypeVar("T")

AbstractDynamoService = AbstractService
DynamoClient = Stub
DependencyInterface = DynamoDependency = Dependency


class ComponentType(StrEnum):
    """Values of `@service(dynamo={"component_type": ...})`."""

    PLANNER = "planner"


class LinkedServices:
    """No-op, kept for ai-dynamo 0.3: a graph leaves out unlinked services by itself."""

    @staticmethod
    def remove_unused_edges() -> None:
        """Do nothing: `.dependencies` of a service already shows only what is linked."""


class LeaseConfig(BaseModel):
    """`custom_lease` of a service; without effect, since leases are kept alive by the process. `ttl` is in seconds."""

    ttl: int = 1


class DynamoConfig(BaseModel):
    """The argument `dynamo` of `@service`."""

    enabled: bool = True
    name: str | None = None
    namespace: str | None = None
    custom_lease: LeaseConfig | None = None
    component_type: str | None = None


class ResourceConfig(BaseModel):
    """The argument `resources` of `@service`; numbers become text, as in 0.3."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    cpu: str = "1"
    memory: str = "500Mi"
    gpu: str = "0"


class KubernetesOverrides(BaseModel):
    """`kubernetes_overrides` of a service; without effect."""

    entrypoint: list[str] | str | None = None
    cmd: list[str] | str | None = None


class Env(BaseModel):
    """A variable in `envs` of `@service`."""

    name: str
    value: str = ""


class ServiceConfig(BaseModel):
    """What `Service.config` returned in ai-dynamo 0.3."""

    dynamo: DynamoConfig
    resources: ResourceConfig = ResourceConfig()
    workers: int = 1
    image: str | None = None
    envs: list[Env] | None = None
    labels: dict[str, str] | None = None
    kubernetes_overrides: KubernetesOverrides | None = None


def declared_config(spec: ServiceSpec) -> ServiceConfig:
    """Return a declaration in the form of 0.3, where resources are text: "1" GPU, not 1.0."""
    gpu, cpu, memory = spec.resources
    return ServiceConfig(
        dynamo=DynamoConfig(name=spec.name, namespace=spec.namespace, component_type=spec.component_type),
        resources=ResourceConfig(cpu=cpu, memory=memory, gpu=f"{gpu:g}"),
        workers=spec.workers,
        image=spec.image,
        envs=[Env(name=name, value=value) for name, value in spec.envs.items()] or None,
    )


class _ServiceKind(type):
    def __instancecheck__(cls, value: object) -> bool:
        return is_service(value)


class ServiceInterface(Generic[T], metaclass=_ServiceKind):
    """The type of the object that `@service` returned in 0.3: every class with `@service` is an instance."""


class _EndpointKind(type):
    def __instancecheck__(cls, value: object) -> bool:
        return hasattr(value, ENDPOINT_MARK) or hasattr(value, ROUTE_MARK)


class DynamoEndpoint(metaclass=_EndpointKind):
    """The type of what `@endpoint` and `@api` returned in 0.3: every method with either is an instance."""

    def __new__(cls, func: Any, name: str | None = None, transports: Any = None, **options: Any) -> Any:
        """Return `func`, marked as `@endpoint` does."""
        return endpoint(name=name, transports=transports, **options)(func)


DynamoEndpointInterface = DynamoEndpoint
